"""What every stage of every slot has in common."""

from abc import ABC
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import attrs

from kvframe.types import Invariant

Slot = Literal["trigger", "units", "scorer", "selector", "transfer"]
SLOTS: tuple[Slot, ...] = ("trigger", "units", "scorer", "selector", "transfer")


class Stage(ABC):
    """An immutable setting of one slot; it is its own config.

    A final stage is an `attrs.frozen(kw_only=True)` class. Running state is made by `init` and handed back to every
    call; its tensors are updated in place, so that a captured CUDA graph stays valid.
    """

    slot: ClassVar[Slot]
    """Set by the slot's abstract class."""
    name: ClassVar[str]
    """What `kvframe list` and `Policy.to_dict` call it; kebab-case, unique in its slot."""
    capturable: ClassVar[bool] = False
    """Whether a CUDA graph can repeat the stage's part of a decode step: it reads no device value from the host,
    decides nothing in Python that differs from step to step, and keeps its state in tensors updated in place."""
    waives: ClassVar[frozenset[Invariant]] = frozenset()
    """Promises that a policy with this stage does not make."""
    calibrated: ClassVar[tuple[str, ...]] = ()
    """Options of this stage whose values have to fit the model, and can be found from unlabelled text."""

    needs_token_ids: ClassVar[bool] = False
    """Whether the stage is to be told the ids of tokens."""

    def with_parts(self) -> Iterator["Stage"]:
        """This stage, and those that it is made of."""
        yield self
        for attribute in attrs.fields(type(self)) if attrs.has(type(self)) else ():  # type: ignore[arg-type]
            part = getattr(self, attribute.name)
            if isinstance(part, Stage):
                yield from part.with_parts()

    def fitted(self, tokenizer: Any) -> Self:
        """The stage for texts of a Hugging Face tokenizer: itself, or with what it has to know of the vocabulary."""
        changed: Any = {}
        for attribute in attrs.fields(type(self)) if attrs.has(type(self)) else ():  # type: ignore[arg-type]
            part = getattr(self, attribute.name)
            if isinstance(part, Stage) and (fitted := part.fitted(tokenizer)) is not part:
                changed[attribute.name] = fitted
        evolve: Any = attrs.evolve
        made: Self = evolve(self, **changed) if changed else self
        return made
