"""One family, compared: full budget against plain generate, tight budget against `dense` execution."""

import textwrap
import time
from typing import Any

import torch
from attrs import evolve, frozen
from transformers import PreTrainedModel

from kvframe.errors import UnsupportedCallError, UnsupportedModelError
from kvframe.hf.attachment import attach
from kvframe.hf.cache import RetrievalCache
from kvframe.hf.families.configs import build_model
from kvframe.hf.families.outcome import Outcome, Status
from kvframe.hf.families.sizes import SPECIAL_TOKENS, VOCAB_SIZE
from kvframe.registry import default_registry
from kvframe.report import Report
from kvframe.types import Execution

TOLERANCE = 2e-5
"""Largest accepted logit difference in float32, as a share of the largest logit of the plain run."""

PROMPT_TOKENS = 48
PADDING = 11
NEW_TOKENS = 12
TIGHT_BUDGET = 16


@frozen
class _Run:
    tokens: torch.Tensor
    logits: torch.Tensor
    """[batch, new tokens, vocabulary]"""


def compare(model_type: str) -> Outcome:
    """Build one family and compare its runs; whatever happens becomes an outcome."""
    start = time.perf_counter()
    outcome = _compare(model_type)
    return evolve(outcome, seconds=time.perf_counter() - start)


def _compare(model_type: str) -> Outcome:
    try:
        model = build_model(model_type)
        plain = _generate(model)
        again = _generate(model)
    except Exception as error:
        return Outcome(model_type=model_type, status=Status.NOT_BUILDABLE, reason=_what(error))
    outcome = Outcome(model_type=model_type, status=Status.NOT_BUILDABLE, model_class=type(model).__name__)
    if not plain.logits.isfinite().all():
        return evolve(outcome, reason="plain generate gives logits that are not finite")
    if not again.logits.equal(plain.logits):
        return evolve(outcome, reason="plain generate gives other logits when repeated")
    outcome = _compare_attached(outcome, model, plain)
    if not _generate(model).logits.equal(plain.logits):
        return evolve(outcome, status=Status.DIFFERENT, reason="detached, the model is not what it was")
    return outcome


def _compare_attached(outcome: Outcome, model: PreTrainedModel, plain: _Run) -> Outcome:
    try:
        full = _attached(model, PROMPT_TOKENS + NEW_TOKENS, "offload")
        dense = _attached(model, TIGHT_BUDGET, "dense")
        tight = _attached(model, TIGHT_BUDGET, "offload")
    except (UnsupportedModelError, UnsupportedCallError) as error:
        return evolve(outcome, status=Status.REFUSED, reason=_sentence(error))
    except Exception as error:
        return evolve(outcome, status=Status.ERROR, reason=_what(error))
    full_error = _distance(full.run, plain, plain)
    tight_error = _distance(tight.run, dense.run, plain)
    selections = sum(layer.selections for layer in tight.report.layers)
    problems = {
        "full budget: logits are not those of plain generate": not full_error <= TOLERANCE,
        "full budget: tokens are not those of plain generate": not full.run.tokens.equal(plain.tokens),
        "tight budget: logits of offload are not those of dense": not tight_error <= TOLERANCE,
        "tight budget: tokens of offload are not those of dense": not tight.run.tokens.equal(dense.run.tokens),
        "tight budget: offload attended to other positions than dense": tight.attended != dense.attended,
        "tight budget: no layer selected and recalled": not (selections and tight.report.rows_recalled),
    }
    problem = next((problem for problem, found in problems.items() if found), "")
    return evolve(
        outcome,
        status=Status.DIFFERENT if problem else Status.EQUAL,
        reason=problem,
        layers=tight.layers,
        retrieval_layers=len(tight.report.layers),
        selections=selections,
        rows_recalled=tight.report.rows_recalled,
        full_error=full_error,
        tight_error=tight_error,
        tight_effect=_distance(tight.run, plain, plain),
    )


def _generate(model: PreTrainedModel) -> _Run:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(SPECIAL_TOKENS, VOCAB_SIZE, (2, PROMPT_TOKENS), generator=generator)
    mask = torch.ones_like(tokens)
    tokens[1, :PADDING] = 0
    mask[1, :PADDING] = 0
    generate: Any = model.generate
    result = generate(
        tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        suppress_tokens=list(range(SPECIAL_TOKENS)),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return _Run(result.sequences, torch.stack(result.logits, 1).float())


@frozen
class _Attached:
    run: _Run
    report: Report
    layers: int
    attended: dict[tuple[int, int, int], list[int]]
    """Positions of the last step, by layer, row of the batch and KV head."""


def _attached(model: PreTrainedModel, token_budget: int, execution: Execution) -> _Attached:
    # every similarity is below tau, so that every step selects anew
    policy = default_registry().make_policy(
        "louiskv", token_budget=token_budget, sink_size=4, window_size=8, dense_layers=(), tau=2.0, cluster_size=4
    )
    with attach(model, policy, execution=execution) as run:
        result = _generate(model)
        return _Attached(result, run.report(), len(run.cache.layers), _attended(run.cache))


def _attended(cache: RetrievalCache) -> dict[tuple[int, int, int], list[int]]:
    layouts = [layer.runtime.layout for layer in cache.managed_layers if layer.runtime is not None]
    return {
        (layout.layer_idx, row, head): cache.attended_positions(layout.layer_idx, row, head).tolist()
        for layout in layouts
        for row in range(layout.batch_size)
        for head in range(layout.num_kv_heads)
    }


def _distance(run: _Run, other: _Run, plain: _Run) -> float:
    return float((run.logits - other.logits).abs().max() / plain.logits.abs().max())


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {_sentence(error)}"


def _sentence(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" ...")
