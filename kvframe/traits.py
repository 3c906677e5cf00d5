"""What a policy costs and gives up, read off its stages."""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.stages import SLOTS

Loses = Literal["nothing", "precision", "tokens"]
Moves = Literal["nothing", "missing rows"]


@frozen(kw_only=True)
class Traits:
    """What one policy is like, for tables; `traits_of` makes it."""

    stages: dict[str, tuple[str, ...]]
    """By slot: the stage's name, and behind it the names of those it is made of."""
    retrieves: bool
    """Whether tokens that have left the window can come back while decoding."""
    loses: Loses
    """What is gone for good of a token that is not attended: nothing, digits of its numbers, or all of it."""
    moves: Moves
    """What comes over the link from the host while decoding."""
    calibrated: tuple[str, ...]
    """Options of its stages whose values have to fit the model."""
    capturable: bool
    """Whether a decode step can be one CUDA graph."""


def traits_of(policy: Policy) -> Traits:
    """The traits of a composition."""
    parts = {slot: list(policy.stage(slot).with_parts()) for slot in SLOTS}
    every = [stage for slot in SLOTS for stage in parts[slot]]
    is_dense = policy.dense_layers == "all"
    retrieves = not is_dense and policy.selector.capacity > 0
    return Traits(
        stages={slot: tuple(stage.name for stage in parts[slot]) for slot in SLOTS},
        retrieves=retrieves,
        loses="nothing" if is_dense else policy.transfer.loses,
        moves="missing rows" if retrieves and policy.transfer.crosses_link else "nothing",
        calibrated=tuple(dict.fromkeys(option for stage in every for option in stage.calibrated)),
        capturable=all(stage.capturable for stage in every),
    )
