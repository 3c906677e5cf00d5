"""What the tests of this folder share: a short run through a layer, watched, and plain Python to hold it against."""

import math
from typing import Any

import torch
from attrs import frozen

from kvframe import Policy, StepInputs, UnitTable
from kvframe.runtime import RetrievalLayer
from kvframe.stages.scorer import Index
from kvframe.testing.altered import altered
from kvframe.testing.cases import Case, Text, Turn, attended, make_call, unit_positions
from kvframe.testing.small import with_dense_layers

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
    batch: int
    """The sequence."""
    head: int
    """The KV head."""
    out: list[Vector]
    """What attention gave each query head."""

    @property
    def retrieved(self) -> set[int]:
        """Attended positions that some unit holds."""
        return set(self.attended) & {position for unit in self.units for position in unit}


def steps_of(policy: Policy, case: Case = CASE) -> list[Step]:
    """Every decode step of a case under a policy, for every sequence and KV head, in float64 through `offload`."""
    num_units: list[torch.Tensor] = []

    def score(original: Any, inputs: StepInputs, index: Index, units: UnitTable) -> torch.Tensor:
        num_units[:] = [units.num_units.clone()]
        return original(inputs, index, units)

    watched = altered(policy.scorer, score=score)
    layer = case.layer(with_dense_layers(policy, ()).swap(scorer=watched), "offload")
    text = case.text(layer.layout)
    found = []
    for call in case.calls():
        out = make_call(layer, text, case, call)
        if not call.is_prompt:
            positions = attended(layer)
            for batch in range(case.batch_size):
                for head in range(case.num_kv_heads):
                    found.append(_step(layer, text, case, call.start, batch, head, positions, num_units, out))
    return found


def _step(
    layer: RetrievalLayer,
    text: Text,
    case: Case,
    column: int,
    batch: int,
    head: int,
    positions: list[list[list[int]]],
    num_units: list[torch.Tensor],
    out: torch.Tensor,
) -> Step:
    group = case.group_size
    count = int(num_units[0][batch, head]) if num_units else 0
    return Step(
        queries=text.query[batch, head * group : (head + 1) * group, column].tolist(),
        keys=text.keys[batch, head, case.padding[batch] : column + 1].tolist(),
        num_prompt=sum(case.turns[0].chunks) - case.padding[batch],
        units=unit_positions(layer, batch, head, count),
        attended=positions[batch][head],
        window=int(layer.ledger.window[batch, head]),
        batch=batch,
        head=head,
        out=out[batch, head * group : (head + 1) * group, 0].tolist(),
    )


def dot(one: Vector, other: Vector) -> float:
    """Scalar product."""
    return sum(x * y for x, y in zip(one, other, strict=True))


def cosine(one: Vector, other: Vector) -> float:
    """Of two vectors that are not zero."""
    return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))


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


def attention(queries: list[Vector], keys: list[Vector]) -> list[Vector]:
    """Weights of each query over all keys."""
    scale = 1 / math.sqrt(len(keys[0]))
    return [softmax([scale * dot(query, key) for key in keys]) for query in queries]
