"""One policy, two executions: `dense` keeps everything on the device under a mask, `offload` moves rows."""

import torch

from kvframe.composition import Policy
from kvframe.registry import Registry
from kvframe.testing.broken import Broken, require_close, require_equal_traces
from kvframe.testing.cases import Case, Heads, play
from kvframe.testing.models import ModelTrace, model_inputs, play_model, tiny_llama
from kvframe.types import Execution


def layer_is_the_same(policy: Policy, case: Case, execution: Execution) -> None:
    """The same positions and outputs in both executions of one layer."""
    text = case.text(case.layout())
    dense, offload = (play(case.layer(policy, each), text, case) for each in ("dense", "offload"))
    require_equal_traces(dense, offload, 1e-10, "dense", "offload")


def model_is_the_same(policy: Policy, case: Case, execution: Execution, registry: Registry | None = None) -> None:
    """The same positions in every layer at every step, and the same logits, in both executions of a tiny model.

    Attention kernels that a plugin brings run in `offload` alone, and so are held to those of kvframe.
    """
    model = tiny_llama(num_kv_heads=_model_heads(case))
    dense, offload = (play_model(model, policy, case, each, registry=registry) for each in ("dense", "offload"))
    require_equal_models(dense, offload, 1e-8, "dense", "offload")


def model_rows_are_independent(policy: Policy, case: Case, execution: Execution) -> None:
    """Logits and positions of a row are the same alone and in a batch with padding, through a whole model."""
    model, inputs = tiny_llama(num_kv_heads=_model_heads(case)), model_inputs(case)
    together = play_model(model, policy, case, execution, inputs)
    for batch, padding in enumerate(case.padding):
        alone = play_model(model, policy, case.alone(batch), execution, inputs.row(batch, padding))
        own = ModelTrace(
            logits=[torch.cat(together.logits, 1)[batch : batch + 1, padding:]],
            attended=[[[layer[batch]] for layer in layers] for layers in together.attended],
        )
        whole = ModelTrace(logits=[torch.cat(alone.logits, 1)], attended=alone.attended)
        require_equal_models(whole, own, 1e-8, f"row {batch} alone (below: row 0)", "the same row in the batch")


def require_equal_models(expected: ModelTrace, actual: ModelTrace, tolerance: float, who: str, other: str) -> None:
    """The same positions in every layer at every step, and the same logits but for rounding."""
    for step, (one, two) in enumerate(zip(expected.attended, actual.attended, strict=True)):
        for layer, (wanted, found) in enumerate(zip(one, two, strict=True)):
            if wanted != found:
                raise Broken(f"decode step {step}, layer {layer}: {_difference(wanted, found, who, other)}")
    require_close(expected.logits, actual.logits, tolerance, who, other, "logits of call")


def _difference(wanted: Heads, found: Heads, who: str, other: str) -> str:
    for batch, (rows, others) in enumerate(zip(wanted, found, strict=True)):
        for head, (positions, different) in enumerate(zip(rows, others, strict=True)):
            if positions != different:
                return f"row {batch}, KV head {head}: {who} attends to {positions}, {other} to {different}"
    raise AssertionError("called with what differs")


def _model_heads(case: Case) -> int:
    """As many KV heads as the case has, or as near as four query heads allow."""
    return case.num_kv_heads if case.num_kv_heads in (1, 2, 4) else 2
