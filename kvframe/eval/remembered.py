"""What full attention predicts for the last few samples, so that policies on one sample share it."""

import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING

from attrs import define, field, frozen
from torch import Tensor

from kvframe.eval.forced import full_logits
from kvframe.eval.tasks import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_SAMPLES = 4
"""Samples that are remembered at most."""
MOST_BYTES = 2**30
"""Bytes of their logits at most, but that the last sample is always remembered."""


@frozen(eq=False)
class _Entry:
    """Logits of one sample under one model."""

    model: "weakref.ref[PreTrainedModel]"
    question: Hashable
    """All else that the logits depend on."""
    logits: Tensor
    """[n, vocabulary], on the CPU: a device has better use for its memory, and what lies there would show in figures
    of it."""


@define(eq=False)
class RememberedLogits:
    """`full_logits` that computes the same thing once.

    A model is known by being the same object with the same tensors, none of which was written to, put elsewhere or
    given another dtype since.
    """

    _entries: list[_Entry] = field(factory=list, init=False)
    """The last used at the end."""

    def of(self, model: "PreTrainedModel", sample: Sample) -> Tensor:
        """What full attention predicts for each token of the continuation: [n, vocabulary], not to be written to.

        Raises what `full_logits` raises.
        """
        question = (_state(model), _places(sample), sample.ids.numpy().tobytes())
        for entry in self._entries:
            if entry.model() is model and entry.question == question:
                self._entries.remove(entry)
                self._entries.append(entry)
                return entry.logits.to(model.device)
        logits = full_logits(model, sample)
        self._entries.append(_Entry(weakref.ref(model), question, logits.cpu()))
        self._forget()
        return logits

    def _forget(self) -> None:
        """Let go of what is beyond the bounds, and of models that are gone."""
        kept: list[_Entry] = []
        room = MOST_BYTES
        for entry in reversed(self._entries):
            room -= entry.logits.nbytes
            if entry.model() is not None and len(kept) < MOST_SAMPLES and (room >= 0 or not kept):
                kept.append(entry)
        self._entries = kept[::-1]


def _places(sample: Sample) -> tuple[tuple[int, int], ...]:
    """Prompt and continuation tokens of every turn."""
    return tuple((len(turn.prompt_ids), len(turn.continuation_ids)) for turn in sample.turns)


def _state(model: "PreTrainedModel") -> Hashable:
    """What a model computes with: changes with every write to a parameter or buffer, and with where they lie."""
    tensors = (*model.parameters(), *model.buffers())
    held = tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device) for t in tensors)
    return model.training, getattr(model.config, "_attn_implementation", None), held


remembered_logits = RememberedLogits()
"""Of this process."""
