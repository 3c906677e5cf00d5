"""`kvframe compare`: policies at equal totals."""

import copy
from typing import Any

import attrs
import pytest
import torch
from eval.conftest import Tiny

import kvframe
from kvframe.calibration import Calibration
from kvframe.errors import ConfigError, UnknownNameError
from kvframe.eval.compare import POLICIES, Row, Setting, compare, contender, installed
from kvframe.eval.compare_tables import grids, markdown_page

SETTING = Setting(budgets=(64, 128), sink_size=8, window_size=16, dense_layers=(0,))


def rows_of(tiny: Tiny, policies: tuple[str, ...], **changes: Any) -> list[Row]:
    """Both tasks, small."""
    tasks = [kvframe.eval.task("niah_multiquery", num_needles=2), kvframe.eval.task("copy", copy_tokens=20)]
    options: dict[str, Any] = {"tasks": tasks, "setting": SETTING, "context": 1200, "seed": 0}
    return list(compare(tiny.model, tiny.tokenizer, policies=policies, haystack=tiny.haystack, **options | changes))


def test_equal_totals(tiny: Tiny):
    """Every policy attends to as many tokens, but for what of a unit has not left the window."""
    rows = rows_of(tiny, ("oracle_topk", "louiskv", "window"))

    assert len(rows) == 2 * 2 * 2 * 3
    for row in rows:
        total = SETTING.sink_size + SETTING.window_size + row.token_budget
        slack = SETTING.window_size // 2 if row.policy == "louiskv" else 0
        assert row.attended_total is not None and total <= row.attended_total <= total + slack
        assert (row.retrieval_rate == 1) == (
            row.policy == "oracle_topk" or row.trigger == "every-step" != row.policy
        ) or (row.policy == "window" and row.retrieval_rate == 0)


def test_more_budget_is_nearer_to_full_attention(tiny: Tiny):
    """A budget beyond the text is full attention, and a policy that attends to everything has no distance."""
    setting = Setting(budgets=(64, 2000), sink_size=8, window_size=16, dense_layers=(), triggers=("own",))
    small, large = rows_of(tiny, ("oracle_topk",), setting=setting, tasks=[kvframe.eval.task("copy", copy_tokens=20)])

    assert small.kl is not None and large.kl is not None
    assert small.kl > 1e-6 > large.kl and large.score == large.score_full and large.top1_agreement == 1


def test_what_cannot_run_has_its_reason(tiny: Tiny):
    """And does not stop the others."""
    setting = Setting(budgets=(8, 64), window_size=16, dense_layers=(0,), triggers=("every-step",))
    rows = rows_of(tiny, ("louiskv", "oracle_topk"), setting=setting, tasks=[kvframe.eval.task("copy", copy_tokens=5)])

    assert [row.refused is None for row in rows] == [False, True, True, True]
    assert "a budget of 8 tokens is smaller than one unit" in (rows[0].refused or "")


def test_before_anything_runs(tiny: Tiny):
    """A text longer than the model's, an unknown policy."""
    with pytest.raises(ConfigError, match="the context has 5000 tokens, the model reads at most 4096"):
        rows_of(tiny, ("window",), context=5000)
    with pytest.raises(UnknownNameError, match="did you mean 'louiskv'"):
        rows_of(tiny, ("louskv",))


def test_triggers():
    """One is swapped where there is something to select; what the options leave out is as it is."""
    every, own = (contender("louiskv", 64, trigger, SETTING) for trigger in ("every-step", "own"))
    window = contender("window", 64, "every-step", SETTING)

    assert every == own.swap(trigger=kvframe.EveryStep()) != own
    assert window.window_size == 16 + 64 and window.trigger == kvframe.Never()
    assert contender("full", 64, "own", SETTING) == kvframe.policy("full")


def test_calibrated_triggers():
    """Thresholds of the setting, for those who compare queries as LouisKV does; another tau is another matter."""
    found = Calibration(tau=(0.1, 0.9), rope="before", retrieval_rate=0.07, achieved=(0.07, 0.07), num_samples=9)
    setting = attrs.evolve(SETTING, triggers=("calibrated",), calibration=found)
    calibrated = contender("louiskv+4bit", 64, "calibrated", setting)

    assert (calibrated.trigger.tau, calibrated.trigger.rope) == ((0.1, 0.9), "before")
    assert calibrated == contender("louiskv+4bit", 64, "own", setting).swap(trigger=calibrated.trigger)
    for name in ("freekv", "window"):
        assert contender(name, 64, "calibrated", setting) == contender(name, 64, "own", setting)
    with pytest.raises(ConfigError, match="'calibrated' needs a calibration; make one with `kvframe calibrate"):
        attrs.evolve(SETTING, triggers=("calibrated",))


def test_installed():
    """What is known and not there is named."""
    found, missing = installed(("window", "no-such", "louiskv"))

    assert (found, missing) == (["window", "louiskv"], ["no-such"])
    assert {"oracle_topk", "louiskv", "window"} <= set(installed(POLICIES)[0])


def test_tables():
    """Policies down, budgets across, in the order that they came in."""
    rows = [
        Row(task="copy", policy=name, token_budget=budget, trigger="own", kl=kl, retrieval_rate=0.07)
        for budget, name, kl in ((1, "a", 0.5), (1, "b", None), (2, "a", 0.25), (2, "b", 1.0))
    ]
    (grid,) = grids(rows)

    assert grid.headings == ["policy", "1 retrieved", "2 retrieved"]
    assert grid.lines == [["a", "0.500 (7%)", "0.250 (7%)"], ["b", "refused", "1.000 (7%)"]]


def test_distance_to_the_oracle():
    """Stands behind every figure of the page, where the oracle was compared as well."""
    common = {"task": "copy", "trigger": "own", "kl_all": 0.1, "top1_agreement": 1.0, "score": 1.0, "score_full": 1.0}
    common |= {"attended_total": 9.0, "retrieval_rate": 1.0, "bytes_per_token": 5.0}
    rows = [
        Row(policy=name, token_budget=budget, kl=kl, **common)  # type: ignore[arg-type]
        for name, budget, kl in (("oracle_topk", 1, 0.25), ("window", 1, 0.75), ("window", 2, 1.0))
    ]
    page = markdown_page(rows, {"conditions": {"model": "m"}, "environment": {}, "not_installed": ["x"]}, {})
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| copy")]

    assert [line[-1].strip(" |") for line in lines] == ["+0.0000", "+0.5000", ""]
    assert "Not installed, and left out: x." in page


@pytest.mark.model
def test_on_a_real_model(smollm2: Any):
    """At 2K: what the oracle selects is next to full attention, sinks and recent tokens alone are far from it, and
    LouisKV's units lie between."""
    model = copy.deepcopy(smollm2.model).to(torch.bfloat16)
    rows = compare(
        model,
        smollm2.tokenizer,
        tasks=[kvframe.eval.task("niah_multiquery", num_needles=2, digits=4)],
        policies=("oracle_topk", "louiskv", "window"),
        setting=Setting(budgets=(256,), triggers=("every-step",)),
        context=2048,
        seed=0,
        haystack=kvframe.eval.haystack(),
    )
    oracle, louiskv, window = rows

    assert oracle.kl < 0.02 < louiskv.kl < window.kl and window.kl > 0.5
    assert oracle.score == oracle.score_full > window.score
