"""Hypothesis strategies for cases, stages and policies.

Options are drawn by their name, or by their annotation where that lists the choices, so that whatever is registered
joins; an option of another kind keeps its default.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from attrs import frozen
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from kvframe.composition import Policy
from kvframe.errors import ConfigError
from kvframe.options import option_names
from kvframe.registry import PolicyRecord, Registry, StageRecord, default_registry
from kvframe.stages import SLOTS, MeanKey, Scorer, Selector, Stage, Trigger
from kvframe.testing.cases import Case, Turn
from kvframe.testing.small import with_dense_layers
from kvframe.types import Decision, LayerLayout, StepInputs

Own = Mapping[str, SearchStrategy[Any]]
"""Strategies by the name of the option, before those that are known here."""

_FEW = st.integers(1, 4)

# By the name of the option. No unit is larger than the smallest budget.
_OPTIONS: dict[str, SearchStrategy[Any]] = {
    "alpha": st.sampled_from([0.0, 0.02, 0.1, 1.0]),
    "anchor": st.none() | st.sampled_from([-1.0, 0.0, 0.5, 0.9, 1.5]),
    "beta": _FEW,
    "block_size": st.integers(5, 40),
    "byte_budget": st.integers(40, 2000),
    "cluster_size": _FEW,
    "dense_layers": st.sampled_from([(), (0,), (1,)]),
    "end_ids": st.sampled_from([(1, 4), (0, 2, 3, 7), (6,)]),
    "estimated_share": st.sampled_from([0.0, 0.3, 1.0]),
    "filter_layers": st.sampled_from([(0,), (0, 1)]),
    "floor": st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    "group_size": st.integers(1, 6),
    "hysteresis": st.none() | st.sampled_from([0.0, 0.2, 0.6]),
    "kernel_size": st.sampled_from([1, 3, 5]),
    "local_size": st.integers(1, 12),
    "max_age": st.none() | st.integers(1, 6),
    "max_segment": st.integers(1, 6),
    "max_sentence": st.integers(1, 6),
    "max_tokens": st.integers(4, 16),
    "min_segment": _FEW,
    "mix": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "num_iterations": st.integers(0, 3),
    "num_keys": _FEW,
    "num_queries": st.integers(1, 6),
    "observation_window": st.integers(1, 8),
    "oversample": st.integers(1, 4),
    "p": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    "output_block_size": st.integers(1, 12),
    "page_size": _FEW,
    "room": st.integers(0, 6),
    "run_length": st.integers(1, 3),
    "similarity": st.sampled_from([-0.5, 0.2, 0.5]),
    "sink_size": st.integers(0, 6),
    "sparsity": st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    "split_factor": st.integers(1, 3),
    "stride": st.integers(1, 5),
    "tau": st.sampled_from([-1.0, 0.0, 0.5, 0.9, 1.5]),
    "token_budget": st.integers(4, 16) | st.sampled_from([40, 300]),
    "window_size": st.integers(1, 12),
}


def examples(factor: float) -> settings:
    """So many times the examples of the profile: fewer where one is expensive, more where it is cheap."""
    return settings(max_examples=max(1, round(settings().max_examples * factor)))


def options(
    config_cls: type[Any], own: Own | None = None, registry: Registry | None = None
) -> SearchStrategy[dict[str, Any]]:
    """Options of a stage or of a policy's config; `undrawn` says which of them keep their defaults."""
    hints, drawn = _hints(config_cls), {}
    for name in option_names(config_cls):
        strategy = _strategy(name, hints.get(name), own or {}, registry)
        if strategy is not None:
            drawn[name] = strategy
    return st.fixed_dictionaries(drawn)


def undrawn(config_cls: type[Any], own: Own | None = None) -> tuple[str, ...]:
    """Options for which there is no strategy, neither by name nor by annotation."""
    hints = _hints(config_cls)
    return tuple(name for name in option_names(config_cls) if _strategy(name, hints.get(name), own or {}, None) is None)


def _strategy(name: str, hint: Any, own: Own, registry: Registry | None) -> SearchStrategy[Any] | None:
    if name in own:
        return own[name]
    if name in _OPTIONS:
        return _OPTIONS[name]
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if hint is bool:
        return st.booleans()
    if _is_slot(hint):
        # Parts that have parts of their own would nest without end.
        return st.deferred(lambda: stages(hint.slot, own, registry, nested=False))
    return None


def _hints(config_cls: type[Any]) -> dict[str, Any]:
    try:
        return get_type_hints(config_cls)
    except NameError:  # annotated with what only type checkers import
        return {}


def _is_slot(hint: Any) -> bool:
    """Is it the abstract class of a slot?"""
    return isinstance(hint, type) and issubclass(hint, Stage) and getattr(hint, "slot", None) in SLOTS


def stages(
    slot: str, own: Own | None = None, registry: Registry | None = None, *, nested: bool = True
) -> SearchStrategy[Stage]:
    """Any registered stage of a slot; `nested`: also one that is made of other stages."""
    records = [record for record in (registry or default_registry()).stages(slot) if nested or not _has_parts(record)]
    return st.sampled_from(records).flatmap(
        lambda record: options(record.stage, own, registry).map(lambda drawn: record.make(**drawn))
    )


def _has_parts(record: StageRecord) -> bool:
    return any(_is_slot(hint) for hint in _hints(record.stage).values())


def variants(
    record: PolicyRecord, dense_layers: tuple[Any, ...] = ((),), own: Own | None = None
) -> SearchStrategy[Policy]:
    """A registered policy with small options, and one of these sets of dense layers unless all of its are."""

    def make(drawn: dict[str, Any], dense: Any) -> Policy:
        return with_dense_layers(record.make(**drawn), dense)

    return st.builds(make, options(record.config_cls, own), st.sampled_from(dense_layers))


@frozen(kw_only=True)
class ScatteredTrigger(Trigger):
    """Due at steps that differ from head to head, the first one not always among them."""

    name = "scattered"
    seed: int

    def init(self, layout: LayerLayout) -> Tensor:
        return torch.zeros(layout.batch_size, layout.num_kv_heads, dtype=torch.int64)

    def begin(self, query: Tensor, state: Tensor) -> None:
        state.zero_()

    def step(self, inputs: StepInputs, state: Tensor) -> Decision:
        heads = torch.arange(inputs.layout.num_kv_heads)
        due = (state * 31 + heads * 17 + self.seed) * 7919 % 101 < 40
        state.add_(1)
        return Decision(due=due)


def compositions(*, registered: bool = False, plain: bool = False) -> SearchStrategy[Policy]:
    """LouisKV with any stage in any slot; unless all are to be registered ones, perhaps with a trigger whose heads
    decide on their own.

    plain: only stages that waive no promise, and that retrieve where they are due and at no other time.
    """
    choices = {slot: stages(slot).filter(_is_plain) if plain else stages(slot) for slot in SLOTS}
    if not registered:
        choices["trigger"] |= st.builds(ScatteredTrigger, seed=st.integers(0, 100))
    changes: SearchStrategy[dict[Any, Any]] = st.fixed_dictionaries({}, optional=choices)
    own = {"ahead": st.just(False)} if plain else None
    return (
        st.tuples(variants(default_registry().policy_spec("louiskv"), own=own), changes)
        .map(lambda drawn: _swapped(*drawn))
        .filter(lambda policies: len(policies) > 0)
        .map(lambda policies: policies[0])
    )


def _is_plain(stage: Stage) -> bool:
    """Does a step attend to sinks, window and what was selected, as it was stored?"""
    if isinstance(stage, Trigger) and (stage.selects_ahead or stage.attends_in_full):
        return False
    if isinstance(stage, Scorer) and (stage.num_notes or type(stage).init is not Scorer.init):
        return False  # its scores depend on more than what is stored
    return not any(part.waives for part in stage.with_parts())


def _swapped(policy: Policy, changes: dict[Any, Any]) -> tuple[Policy, ...]:
    """Nothing where the stages are refused together, for a reason that tests of refusals look at."""
    selector = changes.get("selector")
    if isinstance(selector, Selector) and selector.needs_means:
        changes = {**changes, "scorer": MeanKey(keep_values=True)}
    try:
        return (policy.swap(**changes),)
    except ConfigError:
        return ()


@st.composite
def turns(draw: st.DrawFn, /, *, max_turns: int = 3, max_prompt: int = 50, max_steps: int = 14) -> tuple[Turn, ...]:
    """One to three turns; prompts may be shorter than sinks or window, and may come in chunks."""
    parts = []
    for _ in range(draw(st.integers(1, max_turns))):
        num_tokens = draw(st.integers(20, max_prompt) | st.integers(1, 8) | st.integers(12, max_prompt))
        cuts = draw(st.sets(st.integers(1, num_tokens), max_size=2)) | {0, num_tokens}
        chunks = tuple(stop - start for start, stop in pairwise(sorted(cuts)))
        parts.append(Turn(chunks=chunks, num_steps=draw(st.integers(1, max_steps))))
    return tuple(parts)


@st.composite
def cases(draw: st.DrawFn, /, **limits: int) -> Case:
    """Shapes, padding, turns, and whether memory was planned for all of it."""
    batch_size = draw(st.sampled_from([2, 1, 3]))
    parts = draw(turns(**limits))
    # Every row has at least one token of its own in the first prompt, and one row has no padding.
    padding = [draw(st.integers(0, sum(parts[0].chunks) - 1)) for _ in range(batch_size)]
    padding[draw(st.integers(0, batch_size - 1))] = 0
    num_kv_heads, group_size = draw(st.sampled_from([(2, 2), (1, 1), (2, 1), (1, 3), (3, 2)]))
    return Case(
        batch_size=batch_size,
        num_kv_heads=num_kv_heads,
        group_size=group_size,
        head_dim=draw(st.sampled_from([4, 5, 8, 16])),
        value_dim=draw(st.sampled_from([None, None, 3])),
        padding=tuple(padding),
        turns=parts,
        capacity=draw(st.none() | st.integers(1, 40)),
        seed=draw(st.integers(0, 2**16)),
    )
