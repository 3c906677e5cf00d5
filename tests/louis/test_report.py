"""What a report says of LouisKV: how often it fired, what it cut, what it attended to."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given

import kvframe
from kvframe import Decision, Policy
from kvframe.report import Report, Timeline, make_report
from kvframe.runtime import RetrievalLayer
from kvframe.testing.cases import Case, make_call
from kvframe.testing.models import tiny_llama
from kvframe.testing.strategies import cases, compositions
from kvframe.testing.tape import Tape

NUM_STEPS = 40


@torch.no_grad()
def generate(**options: Any) -> Report:
    """The report of a run of 40 decode steps after a prompt of 30 tokens, in a model of two layers."""
    sizes = {"token_budget": 12, "sink_size": 2, "window_size": 8, "cluster_size": 3, "dense_layers": ()}
    policy = kvframe.policy("louiskv", **{**sizes, **options})
    ids = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    num_tokens = NUM_STEPS + 1
    with kvframe.attach(tiny_llama(), policy) as run:
        run.model.generate(
            ids, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens, pad_token_id=0
        )
        return run.report()


@pytest.mark.parametrize("heads", ["layer", "kv-head"])
def test_low_tau_fires_once(heads: str):
    """tau = -1: the first step of every layer, row and head selects, and no other."""
    report = generate(tau=-1, trigger_heads=heads)

    assert report.num_decode_steps == NUM_STEPS
    assert report.retrieval_rate == 1 / NUM_STEPS
    assert [(layer.num_steps, layer.selections, layer.retrieval_rate) for layer in report.layers] == [
        (NUM_STEPS, 2 * 2, 1 / NUM_STEPS)
    ] * 2


@pytest.mark.parametrize("heads", ["layer", "kv-head"])
def test_high_tau_fires_always(heads: str):
    """tau > 1: every step of every layer, row and head selects."""
    report = generate(tau=1.001, trigger_heads=heads)

    assert report.retrieval_rate == 1.0
    assert [(layer.selections, layer.retrieval_rate) for layer in report.layers] == [(2 * 2 * NUM_STEPS, 1.0)] * 2


def test_tau_of_each_layer():
    """One layer fires once, the other always."""
    assert [layer.retrieval_rate for layer in generate(tau=(-1.0, 2.0)).layers] == [1 / NUM_STEPS, 1.0]


@pytest.mark.parametrize("min_segment, max_segment", [(1, 1), (2, 5), (4, 4), (3, 7)])
def test_segment_lengths(min_segment: int, max_segment: int):
    """With an event at every step segments have the shortest length, with none the longest; prompt tokens that leave
    the window are cut into the longest."""
    bounds = {"min_segment": min_segment, "max_segment": max_segment}
    always, once = generate(tau=2.0, **bounds).segment_lengths, generate(tau=-1.0, **bounds).segment_lengths
    heads = 2 * 2 * 2  # layers, rows, KV heads
    # Eight prompt tokens lie in the window: full segments are cut at once. The first step ends what is left of them.
    full, rest = divmod(8, max_segment)
    expected = Counter({max_segment: full * heads})
    if rest >= min_segment:
        expected[rest] += heads
        rest = 0
    tokens = NUM_STEPS + rest
    # A unit that the last token fills is closed by the next one.
    assert always == expected + Counter({min_segment: (tokens - 1) // min_segment * heads})
    assert once == expected + Counter({max_segment: (tokens - 1) // max_segment * heads})


def recount(layer: RetrievalLayer, case: Case, tape: Tape) -> Iterator[Counter[str]]:
    """For every decode step: selections, rows they asked for, and attended tokens by kind, from their positions."""
    text = case.text(layer.layout)
    for call in case.calls():
        tape.decisions.clear()
        make_call(layer, text, case, call)
        if call.is_prompt:
            continue
        due = [made.due for made in tape.decisions if isinstance(made, Decision)][-1]  # on review, if there is one
        counts = [made[1] for made in tape.decisions if isinstance(made, tuple)]  # one selection, or none
        found = Counter(steps=1, fired=int(due.sum()), selected=sum(int(count[due].sum()) for count in counts))
        for batch in range(case.batch_size):
            for head in range(case.num_kv_heads):
                recent = call.stop - case.padding[batch] - int(layer.ledger.window[batch, head])
                for position in layer.attended_positions(batch, head).tolist():
                    is_sink = position < layer.policy.sink_size
                    found["sinks" if is_sink else "window" if position >= recent else "retrieved"] += 1
        yield found


@given(policy=compositions(plain=True), case=cases())
def test_counts(policy: Policy, case: Case):
    """Rates and means over steps, rows and heads are those of a recount from the attended positions."""
    tape = Tape()
    layer = case.layer(tape.wrap(policy), "offload")
    found = sum(recount(layer, case, tape), Counter())
    report = make_report(policy, "offload", [layer], Timeline(), 0)
    chances = found["steps"] * case.batch_size * case.num_kv_heads
    (only,) = report.layers

    assert only.num_steps == found["steps"]
    assert only.selections == (found["fired"] if policy.selector.capacity else 0)
    assert only.rows_selected == report.rows_selected == found["selected"]
    assert report.retrieval_rate == only.retrieval_rate == only.selections / chances
    attended = [report.attended_sinks, report.attended_retrieved, report.attended_window]
    assert attended == pytest.approx([found[kind] / chances for kind in ("sinks", "retrieved", "window")])
    assert report.attended_total == pytest.approx(sum(attended))
    assert report.hit_rate == (1 - report.rows_recalled / found["selected"] if found["selected"] else None)
