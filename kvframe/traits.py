"""What a policy costs and gives up, read off its stages."""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.stages import SLOTS
from kvframe.types import Invariant

Loses = Literal["nothing", "precision", "tokens"]
Moves = Literal["nothing", "missing rows", "all rows"]
Reads = Literal["prompt attention", "decode attention", "token ids"]


@frozen(kw_only=True)
class Traits:
    """What one policy is like, for tables; `traits_of` makes it."""

    stages: dict[str, tuple[str, ...]]
    """By slot: the stage's name, and behind it the names of those it is made of."""
    is_dense: bool
    """Whether every layer keeps its whole KV on the device."""
    retrieves: bool
    """Whether tokens that have left the window, and were not attended, can come back while decoding."""
    loses: Loses
    """What is gone for good of a token that is not attended: nothing, digits of its numbers, or all of it."""
    moves: Moves
    """What comes over the link from the host while decoding: rows of a selection that are missing; or, in steps with
    full attention, all rows."""
    estimates: bool
    """Whether tokens that are not retrieved enter attention as estimates."""
    reads: tuple[Reads, ...]
    """What its stages have to be told besides queries, keys and values."""
    calibrated: tuple[str, ...]
    """Options of its stages that are in use, and whose values have to fit the model."""
    capturable: bool
    """Whether each of its stages can be part of a CUDA graph."""


def traits_of(policy: Policy) -> Traits:
    """The traits of a composition."""
    parts = {slot: list(policy.stage(slot).with_parts()) for slot in SLOTS}
    every = [stage for slot in SLOTS for stage in parts[slot]]
    # Parts of a trigger that reviews say where segments are cut, which asks for no threshold that fits the model.
    deciding = [stage for stage in every if not (policy.trigger.reviews and stage in parts["trigger"][1:])]
    is_dense = policy.dense_layers == "all"
    reads: dict[Reads, bool] = {
        "prompt attention": policy.scorer.reads_prompt,
        "decode attention": policy.scorer.reads_attention,
        "token ids": policy.units.needs_token_ids,
    }
    return Traits(
        stages={slot: tuple(stage.name for stage in parts[slot]) for slot in SLOTS},
        is_dense=is_dense,
        retrieves=not is_dense and policy.selector.capacity > 0 and not policy.transfer.drops,
        loses="nothing" if is_dense else _loses(policy),
        moves="nothing" if is_dense else _moves(policy),
        estimates=policy.selector.estimates,
        reads=tuple(what for what, asked in reads.items() if asked),
        calibrated=tuple(
            dict.fromkeys(
                option for stage in deciding for option in stage.calibrated if getattr(stage, option) is not None
            )
        ),
        capturable=all(stage.capturable for stage in every),
    )


def _loses(policy: Policy) -> Loses:
    if policy.transfer.drops:
        return "tokens"
    return "nothing" if Invariant.EXACT_KV in policy.promises else "precision"


def _moves(policy: Policy) -> Moves:
    if not policy.transfer.crosses_link:
        return "nothing"
    if policy.trigger.attends_in_full:
        return "all rows"
    return "missing rows" if policy.selector.capacity else "nothing"
