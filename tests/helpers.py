"""What the tests of stages, memory and policies share beside `kvframe.testing`.

Stages and policies come from the registry, so that whatever is registered joins the tests that loop over it.
"""

import math
from typing import Any

import torch
from attrs import evolve

from kvframe import LayerLayout, StepInputs, Units
from kvframe.registry import PolicyRecord, default_registry
from kvframe.stages import Stage


def stage_id(stage: Stage) -> str:
    """What a test of a stage is called."""
    return stage.name


def step_inputs(layout: LayerLayout, **changes: Any) -> StepInputs:
    """All that a step has for a stage, of the 40th token."""
    heads = (layout.batch_size, layout.num_kv_heads)
    inputs = StepInputs(
        query=torch.ones(layout.batch_size, layout.num_qo_heads, layout.head_dim, dtype=layout.dtype),
        key=torch.ones(*heads, layout.head_dim, dtype=layout.dtype),
        layout=layout,
        due=torch.ones(heads, dtype=torch.bool),
        num_tokens=torch.full(heads, 40),
        token_ids=torch.arange(layout.batch_size),
        row_bytes=layout.row_bytes,
        board={},
    )
    return evolve(inputs, **changes)


def policy_records() -> list[PolicyRecord]:
    """Every registered policy."""
    return list(default_registry().policies())


def record_id(record: PolicyRecord) -> str:
    """What a test of a policy is called."""
    return record.name


def unit_lists(units: Units, head: int) -> list[list[int]]:
    """One head's units of a run of tokens, by their places in it."""
    sizes = units.sizes[head, : int(units.num_units[head])].tolist()
    return [part.tolist() for part in units.order[head].split(sizes)]


def dot(one: list[float], other: list[float]) -> float:
    """Scalar product."""
    return sum(x * y for x, y in zip(one, other, strict=True))


def cosine(one: list[float], other: list[float]) -> float:
    """Of two vectors that are not zero."""
    return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))
