"""What every stage of every slot has in common."""

from abc import ABC
from typing import ClassVar, Literal

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
    waives: ClassVar[frozenset[Invariant]] = frozenset()
    """Promises that a policy with this stage does not make."""
