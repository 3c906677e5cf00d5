"""What the tests of eviction policies share: a run in plain numbers, and attention by its definition."""

import math
from collections.abc import Iterable
from typing import Any

from attrs import frozen
from baselines.plain import Vector

from kvframe import Policy
from kvframe.testing.cases import Case, Turn, attended, make_call

CASE = Case(padding=(0, 5), turns=(Turn(chunks=(41,), num_steps=20),), num_kv_heads=2, group_size=2, head_dim=8)
CHUNKED = Case(padding=(0, 5), turns=(Turn(chunks=(9, 2, 27, 3), num_steps=20),), num_kv_heads=2, group_size=2)


@frozen(kw_only=True)
class Sequence:
    """One sequence of a run, in plain numbers."""

    queries: list[list[list[Vector]]]
    """By KV head, query head of its group, and position."""
    keys: list[list[Vector]]
    """By KV head and position."""
    num_prompt: int
    """Tokens of the prompt."""
    attended: list[list[list[int]]]
    """By decode step and KV head."""

    @property
    def num_heads(self) -> int:
        """KV heads."""
        return len(self.keys)

    def steps(self) -> Iterable[tuple[int, list[list[int]]]]:
        """The position of every generated token, and what each KV head attended to when it came."""
        return ((self.num_prompt + step, heads) for step, heads in enumerate(self.attended))

    def shares(self, head: int, position: int, seen: Iterable[int]) -> list[dict[int, float]]:
        """What each query head of a group, at a position, gives to the positions seen."""
        found = []
        for queries in self.queries[head]:
            products = {p: dot(queries[position], self.keys[head][p]) / math.sqrt(len(queries[0])) for p in seen}
            largest = max(products.values(), default=0.0)
            weights = {p: math.exp(product - largest) for p, product in products.items()}
            total = sum(weights.values())
            found.append({p: weight / total for p, weight in weights.items()})
        return found


def dot(one: Vector, other: Vector) -> float:
    """Scalar product."""
    return sum(x * y for x, y in zip(one, other, strict=True))


def mean(numbers: Iterable[float]) -> float:
    """Arithmetic mean."""
    listed = list(numbers)
    return sum(listed) / len(listed)


def best(scores: dict[int, float], number: int) -> set[int]:
    """The keys of the highest scores."""
    return set(sorted(scores, key=lambda key: (-scores[key], key))[:number])


def sequences_of(policy: Policy, case: Case = CASE, **changes: Any) -> list[Sequence]:
    """What every sequence of a case goes through under a policy, in float64 through `offload`; changes of the
    layout."""
    layer = case.layer(policy.swap(dense_layers=()), "offload", **changes)
    text, steps = case.text(layer.layout), []
    for call in case.calls():
        make_call(layer, text, case, call)
        if not call.is_prompt:
            steps.append(attended(layer))
    return [
        Sequence(
            queries=text.query[batch, :, padding:].unflatten(0, (case.num_kv_heads, -1)).tolist(),
            keys=text.keys[batch, :, padding:].tolist(),
            num_prompt=sum(case.turns[0].chunks) - padding,
            attended=[heads[batch] for heads in steps],
        )
        for batch, padding in enumerate(case.padding)
    ]
