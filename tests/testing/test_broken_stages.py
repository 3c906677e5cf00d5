"""Each broken stage is caught: the promise that it breaks is named, and so is the stage."""

import re
from functools import partial

import pytest
from testing import broken_stages as broken

from kvframe.runtime import RetrievalLayer
from kvframe.stages import Stage
from kvframe.testing import ConformanceError, Failure, check_policy, check_stage
from kvframe.types import Invariant

CAUGHT = [
    # what breaks it, the promise, the stage that is blamed, what was seen
    (broken.OneForAll, "contract", "trigger OneForAll", r"step: due: expected bool \[\d, 2\], got bool \[\d, 1\]"),
    (broken.Remembering, "contract", "trigger Remembering", r"keep what changes in the state, not on the trigger"),
    (broken.Remembering, "reset-repeats", "trigger Remembering", r"the first run attends to .* after a reset to"),
    (broken.Listening, "row-independent", "trigger Listening", r"row \d alone .* the same row in the batch"),
    (
        broken.Failing,
        "same-executions",
        "trigger Failing",
        r"IndexError: five is enough \(broken_stages\.py:\d+ in ",
    ),
    (broken.Reading, "capturable", "trigger Reading", r"Reading\.step reads a value from the device: bool\(\)"),
    (broken.Listing, "capturable", "trigger Listing", r"Listing\.step reads a value from the device: tolist\(\)"),
    (broken.Masking, "capturable", "trigger Masking", r"shape depends on values \(indexing by a mask\)"),
    (broken.Rebinding, "capturable", "trigger Rebinding", r"puts a new tensor into state\.steps, .* in place"),
    (broken.CountingInPython, "capturable", "trigger CountingIn", r"changes state\.steps from 0 to 1 in Python"),
    (broken.Alternating, "capturable", "trigger Alternating", r"its first step and .* in a later one"),
    (broken.Forgetting, "contract", "units Forgetting", r"the order \[.*\] is no permutation of its tokens"),
    (broken.Forgetting, "units-disjoint", "units Forgetting", r"units cover the positions \[.*\], expected \[.*\]"),
    (
        broken.Forgetting,
        "no-token-lost",
        "units Forgetting",
        r"the positions \[.*\] are neither attended nor",
    ),
    (broken.Comparing, "row-independent", "scorer Comparing", r"row \d alone .* the same row in the batch"),
    (broken.ScoringNothing, "contract", "scorer ScoringNothing", r"score: expected -inf for units that do not exist"),
    (broken.ExtendingBadly, "contract", "scorer ExtendingBadly", r"extend: mean_key is not what index gives"),
    (broken.Half, "exact-budget", "selector Half", r"a selection is due, and \d tokens are retrieved, expected \d"),
    (broken.Twice, "contract", "selector Twice", r"select: row \d, KV head \d: the rows .* have one twice"),
    (broken.Twice, "no-token-lost", "selector Twice", r"the positions \[.*\] are attended twice"),
    (broken.Twice, "resident-stays", "selector Twice", r"of the rows .* are not resident; .* came"),
    (broken.Unplain, "plain-data", None, r"to_dict gives what JSON cannot hold: .*frozenset"),
    (broken.Renaming, "plain-data", None, r"written down and made again, Renaming\(.*\[1\]\) is Renaming\(.*\(1,\)\)"),
    (broken.Pool(kind=broken.Rounding), "exact-kv", "transfer Pool", r"does not hold the key of its position"),
    (broken.Pool(kind=broken.Rounding), "same-executions", "transfer Pool", r"dense .*offload"),
    (broken.Pool(kind=broken.Cheap), "bytes-counted", "transfer Pool", r"bytes to the host are counted, .* were seen"),
    (broken.Pool(kind=broken.Overwriting), "resident-stays", "transfer Pool", r"was asked for nothing, and wrote keys"),
    (broken.Pool(kind=broken.Neighbour), "attended-only", "transfer Pool", r"attention over the attended positions"),
]


NAMES = [f"{getattr(stage, '__name__', stage)}-{promise}" for stage, promise, _, _ in CAUGHT]


@pytest.fixture
def hardly_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests here need a failure, not the smallest."""
    monkeypatch.setattr("kvframe.testing.conformance._SHRINK_RUNS", 8)


def caught(stage: type[Stage] | Stage, promise: str) -> Failure:
    """The failure of one promise."""
    with pytest.raises(ConformanceError) as raised:
        check_stage(stage, only=[promise], max_examples=25)
    (failure,) = raised.value.failures
    return failure


@pytest.mark.usefixtures("hardly_smaller")
@pytest.mark.parametrize("stage, promise, blamed, seen", CAUGHT, ids=NAMES)
def test_caught(stage: type[Stage] | Stage, promise: str, blamed: str | None, seen: str) -> None:
    """The message names promise and stage, and says what was seen where."""
    failure = caught(stage, promise)
    message = str(failure)

    assert failure.promise.name == promise
    assert message.startswith(f"broken promise: {failure.promise.text} ({promise})\n")
    assert blamed is None or failure.blamed.startswith(blamed)
    assert re.search(seen, message), message
    assert "in    Case(" in message and "execution=" in message


def test_every_invariant_is_broken_here() -> None:
    """No invariant is checked in vain; sinks and window are broken below."""
    names = {invariant.name.lower().replace("_", "-") for invariant in Invariant}

    assert names - {promise for _, promise, _, _ in CAUGHT} == {"always-attended"}


def test_sinks_and_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stage can take the last token out of the window; a layer that did would be caught, and no stage blamed."""
    original = RetrievalLayer.attended_positions
    monkeypatch.setattr(RetrievalLayer, "attended_positions", lambda *args: original(*args)[:-1])
    failure = caught(broken.Counting, "always-attended")

    assert re.search(r"of \d sinks and the last \d of \d+ positions, \[\d+\] are not attended", str(failure))
    assert failure.blamed.startswith("no stage alone")


def test_a_sound_stage_is_not_blamed() -> None:
    """What the broken ones are made of keeps everything."""
    summary = check_stage(broken.Counting, max_examples=1)

    assert all(outcome.examples for outcome in summary.outcomes)


def test_the_smallest_case_fails_again() -> None:
    """The case of a message, and the policy with it, show the failure without drawing."""
    failure = caught(broken.Half, "exact-budget")
    again = partial(check_policy, failure.policy, only=["exact-budget"])

    assert failure.case.num_tokens <= 25
    with pytest.raises(ConformanceError, match=re.escape(str(failure.error))):
        again(case=failure.case)


def test_a_broken_contract_ends_the_check() -> None:
    """What follows from it would only bury it."""
    with pytest.raises(ConformanceError) as raised:
        check_stage(broken.OneForAll, max_examples=2)

    assert [failure.promise.name for failure in raised.value.failures] == ["contract"]
