"""What the tests of this folder share: a short run through a layer, watched, and plain Python to hold it against."""

import math

import torch
from attrs import field, frozen

from kvframe import Policy, Scorer, StepInputs, UnitTable
from kvframe.runtime import RetrievalLayer
from kvframe.stages.scorer import Index
from kvframe.testing.cases import Case, Text, Turn, attended, make_call, unit_positions

Vector = list[float]

CASE = Case(padding=(0, 5), turns=(Turn(chunks=(41,), num_steps=14),), num_kv_heads=2, group_size=2, head_dim=8)


@frozen(kw_only=True)
class Step:
    """One decode step of one KV head, in plain numbers."""

    queries: list[Vector]
    """Of the query heads that share the KV head."""
    keys: list[Vector]
    """Of every token so far, by position."""
    num_prompt: int
    """Tokens of the prompt."""
    units: list[list[int]]
    """What could be selected, by position."""
    attended: list[int]
    """Positions that the step attended to."""
    window: int
    """Tokens in the window."""

    @property
    def retrieved(self) -> set[int]:
        """Attended positions that some unit holds."""
        return set(self.attended) & {position for unit in self.units for position in unit}


@frozen(kw_only=True)
class Watched(Scorer):
    """Another scorer, and the units that there were when it was last asked."""

    name = "watched"
    stage: Scorer
    num_units: list[torch.Tensor] = field(factory=list, eq=False)

    def index(self, *args: object) -> dict[str, torch.Tensor]:
        return self.stage.index(*args)  # type: ignore[arg-type]

    def score(self, inputs: StepInputs, index: Index, units: UnitTable) -> torch.Tensor:
        self.num_units[:] = [units.num_units.clone()]
        return self.stage.score(inputs, index, units)


def steps_of(policy: Policy, case: Case = CASE) -> list[Step]:
    """Every decode step of a case under a policy, for every sequence and KV head, in float64 through `offload`."""
    watched = Watched(stage=policy.scorer)
    layer = case.layer(policy.swap(scorer=watched, dense_layers=()), "offload")
    text = case.text(layer.layout)
    found = []
    for call in case.calls():
        make_call(layer, text, case, call)
        if not call.is_prompt:
            positions = attended(layer)
            for batch in range(case.batch_size):
                for head in range(case.num_kv_heads):
                    found.append(_step(layer, text, case, call.start, batch, head, positions, watched))
    return found


def _step(
    layer: RetrievalLayer,
    text: Text,
    case: Case,
    column: int,
    batch: int,
    head: int,
    positions: list[list[list[int]]],
    watched: Watched,
) -> Step:
    group = case.group_size
    count = int(watched.num_units[0][batch, head]) if watched.num_units else 0
    return Step(
        queries=text.query[batch, head * group : (head + 1) * group, column].tolist(),
        keys=text.keys[batch, head, case.padding[batch] : column + 1].tolist(),
        num_prompt=sum(case.turns[0].chunks) - case.padding[batch],
        units=unit_positions(layer, batch, head, count),
        attended=positions[batch][head],
        window=int(layer.ledger.window[batch, head]),
    )


def softmax(numbers: Vector) -> Vector:
    """Shares that add up to one."""
    weights = [math.exp(number - max(numbers)) for number in numbers]
    return [weight / sum(weights) for weight in weights]


def mean_of_group(scores: list[Vector]) -> Vector:
    """One score a unit from those of every query head."""
    return [sum(column) / len(column) for column in zip(*scores, strict=True)]


def best_tokens(units: list[list[int]], scores: Vector, budget: int) -> set[int]:
    """Tokens of the units in the order of their scores, the last unit cut to fit."""
    ranked = sorted(range(len(units)), key=lambda unit: (-scores[unit], unit))
    return set([token for unit in ranked for token in units[unit]][:budget])
