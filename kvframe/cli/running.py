"""One generation under a policy, with its progress and its text as they come."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from attrs import frozen

from kvframe.cli.console import Bar, progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvframe.composition import Policy
    from kvframe.report import Report
    from kvframe.types import Execution


@frozen(kw_only=True)
class Generated:
    """What a model said under a policy."""

    text: str
    num_prompt_tokens: int
    num_tokens: int
    """Tokens generated."""
    report: "Report"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "text": self.text,
            "prompt_tokens": self.num_prompt_tokens,
            "new_tokens": self.num_tokens,
            "report": self.report.to_dict(),
        }


def generate_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    input_ids: "torch.Tensor",
    policy: "Policy",
    *,
    execution: "Execution" = "offload",
    prefill_chunk_size: int | None = None,
    quiet: bool = False,
    **options: Any,
) -> Generated:
    """Generate under a policy from one prompt [1, T]; streams the text to standard output unless `quiet`.

    options: further arguments of `model.generate`.
    """
    from kvframe.hf import attach

    input_ids = input_ids.to(model.device)
    num_tokens = input_ids.shape[1]
    if prefill_chunk_size is not None:
        options["prefill_chunk_size"] = prefill_chunk_size
    num_passes = -(-num_tokens // (prefill_chunk_size or num_tokens))
    fitted = policy.fitted(tokenizer)
    with attach(model, fitted, execution=execution) as run, _prefill_bar(model, num_passes, quiet) as bar:
        generator: Any = model
        sequences = generator.generate(
            input_ids=input_ids,
            attention_mask=input_ids.new_ones(input_ids.shape),
            streamer=None if quiet else _make_streamer(tokenizer, bar),
            **options,
        )
    new = sequences[0, num_tokens:]
    text = tokenizer.decode(new, skip_special_tokens=True)
    assert isinstance(text, str)
    return Generated(text=text, num_prompt_tokens=num_tokens, num_tokens=len(new), report=run.report())


def _make_streamer(tokenizer: "PreTrainedTokenizerBase", bar: Bar) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Prints text as it comes; whatever the bar shows is gone by then."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            bar.stop()
            super().on_finalized_text(text, stream_end=stream_end)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


@contextmanager
def _prefill_bar(model: "PreTrainedModel", num_passes: int, quiet: bool) -> Iterator[Bar]:
    """A bar over the layers of the passes that read the prompt, which take by far the longest."""
    from torch import nn

    from kvframe.hf.support import decoder_config, decoder_of

    num_layers = decoder_config(model).num_hidden_layers
    stacks = [part for part in decoder_of(model).children() if isinstance(part, nn.ModuleList)]
    layers = next((stack for stack in stacks if len(stack) == num_layers), nn.ModuleList())
    handles: list[Any] = []
    done = 0

    def remove() -> None:
        while handles:
            handles.pop().remove()

    with progress("reading the prompt", quiet=quiet) as bar:

        def layer_done(*_: Any) -> None:
            nonlocal done
            done += 1
            bar.update(done, num_layers * num_passes)
            if done == num_layers * num_passes:
                remove()

        handles += [layer.register_forward_hook(layer_done) for layer in layers]
        try:
            yield bar
        finally:
            remove()
