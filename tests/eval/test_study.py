"""What a study is made of, and what it refuses before anything runs."""

from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
from eval.studies import CONTEXT, save_tiny_model, small_policy, small_study

import kvframe
import kvframe.eval
from kvframe.errors import ConfigError, SlotError, UnknownNameError
from kvframe.eval import Study
from kvframe.eval.identity import code_version


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a directory."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def keys(study: Study) -> list[str]:
    """The keys of all cells."""
    return [cell.key for cell in study.cells()]


def test_variants(model: Path) -> None:
    """The base, the base with one stage exchanged each, and the whole policies."""
    study = small_study(model)
    base, every, rarely, full = study.variants()

    assert [variant.label for variant in study.variants()] == ["louiskv", "trigger: every-step", "rarely", "full"]
    assert (base.slot, every.slot, rarely.slot, full.slot) == (None, "trigger", "trigger", None)
    assert every.policy == base.policy.swap(trigger=kvframe.EveryStep(), name=every.label)
    assert rarely.policy.trigger == kvframe.FixedStride(stride=8)


def test_a_field_of_a_policy_can_vary(model: Path) -> None:
    """Sizes as well as stages; a stage is called by what differs from its defaults."""
    varied = {"window_size": [32, 64], "dense_layers": [(), (0, 1)], "units": [kvframe.PageUnits(page_size=8)]}
    study = small_study(model, vary=varied, policies=[])

    labels = [variant.label for variant in study.variants()[1:]]
    assert labels == ["window_size: 32", "window_size: 64", "dense_layers: ()", "dense_layers: (0, 1)",
                      "units: pages page_size=8"]  # fmt: skip


def test_cells(model: Path) -> None:
    """Every variant at every budget on every task with every seed; one without a budget once; one timeline each."""
    task = kvframe.eval.task("copy", copy_tokens=8, cue_tokens=4)
    study = small_study(model, tasks=[task, attrs.evolve(task, copy_tokens=16)], seeds=range(3))
    scores = [cell for cell in study.cells() if cell.kind == "score"]
    watched = [cell for cell in study.cells() if cell.kind == "watch"]

    assert len(scores) == (3 * 2 + 1) * 2 * 3
    assert [(cell.label, cell.budget) for cell in watched] == [
        ("louiskv", 32), ("trigger: every-step", 32), ("rarely", 32), ("full", None)
    ]  # fmt: skip
    assert {cell.policy.selector.token_budget for cell in scores if cell.label == "louiskv"} == {16, 32}
    assert len(set(keys(study))) == len(study.cells())


def test_a_budget_inside_a_selector(model: Path) -> None:
    """A selector that asks another one has that one's budget."""
    study = small_study(model, vary={}, base=small_policy("louiskv-plus"), policies=[small_policy("twilight")], watch=0)

    assert [(cell.label, cell.budget, cell.policy.selector.capacity) for cell in study.cells()] == [
        (name, budget, budget) for name in ("louiskv-plus", "twilight") for budget in (16, 32)
    ]


def test_each_key_comes_once(model: Path) -> None:
    """The same policy under two names is one cell."""
    twin = small_policy().swap(name="twin")

    assert keys(small_study(model, vary={}, policies=[twin])) == keys(small_study(model, vary={}, policies=[]))


def test_keys_follow_what_decides(model: Path, tmp_path: Path) -> None:
    """Whatever changes the figures changes the key, and nothing else does."""
    study = small_study(model, vary={}, policies=[], watch=0)
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.txt").write_text("a text")
    (tmp_path / "c.txt").write_text("another text")
    haystacks = [keys(attrs.evolve(study, haystack=tmp_path / name)) for name in ("a.txt", "b.txt", "c.txt")]

    assert keys(study) == keys(attrs.evolve(study, title="Another title", base=study.base.swap(name="other")))
    assert haystacks[0] == haystacks[1] != haystacks[2]
    changes: list[dict[str, Any]] = [
        {"context": CONTEXT + 1}, {"seeds": 1}, {"dtype": "bfloat16"}, {"metrics": ["kl"]},
        {"base": small_policy(window_size=17)}, {"tasks": kvframe.eval.task("copy")},
    ]  # fmt: skip
    for change in changes:
        assert not set(keys(study)) & set(keys(attrs.evolve(study, **change))), change


def test_another_model_is_another_key(model: Path, tmp_path: Path) -> None:
    """A copy elsewhere is the same model; other weights or another config are not."""
    study = small_study(model)
    copy = save_tiny_model(tmp_path / "copy")
    assert keys(attrs.evolve(study, model=copy)) == keys(study)

    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert not set(keys(attrs.evolve(study, model=copy))) & set(keys(study))


@attrs.frozen(kw_only=True)
class Lazy(kvframe.Never):
    """A stage of no package."""

    name: ClassVar[str] = "lazy"


def test_code_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy's code is kvframe's, its kernels' and that of the packages its stages come from, and no other."""
    task = kvframe.eval.task("copy")
    louis, window = small_policy(), kvframe.policy("window")
    mine = louis.swap(trigger=Lazy())
    before = [code_version(policy, task) for policy in (louis, window, mine)]
    from kvframe.eval import identity

    digest = identity._package_digest
    for package, changed in (("kvframe_louis", [True, False, True]), ("kvframe_kernels", [True] * 3)):
        monkeypatch.setattr(identity, "_package_digest", lambda name, p=package: "new" if name == p else digest(name))
        after = [code_version(policy, task) for policy in (louis, window, mine)]
        assert [new != old for new, old in zip(after, before, strict=True)] == changed
    assert before[0].startswith(f"{kvframe.__version__}+") and len({*before}) == 3


def refused(kind: type[Exception], part: str, **changes: Any) -> None:
    """A study with these changes is refused, with this in the message."""
    with pytest.raises(kind, match=part):
        small_study("anything", **changes)


def test_refusals() -> None:
    """Each before anything runs, with what was expected, what came and the way out."""
    refused(ConfigError, "tasks is empty", tasks=[])
    refused(ConfigError, "kvframe.eval.task", tasks=["copy"])
    refused(ConfigError, "has a task twice", tasks=[kvframe.eval.task("copy"), kvframe.eval.task("copy")])
    refused(ConfigError, "did you mean 'trigger'", vary={"triger": []})
    refused(ConfigError, "must be a list", vary={"trigger": kvframe.EveryStep()})
    refused(SlotError, "pass it as scorer=", vary={"trigger": [kvframe.MeanKey()]})
    refused(ConfigError, "two variants are called 'rarely'", policies=[small_policy().swap(name="rarely")])
    refused(ConfigError, "needs base=", base=None, vary={}, policies=[])
    refused(ConfigError, "vary needs base", base=None)
    refused(ConfigError, "expected a Policy", policies=["full"])
    refused(ConfigError, "louiskv cannot have token_budget=4: a budget of 4 tokens is smaller", token_budget=[4])
    refused(ConfigError, "token_budget must be whole numbers >= 1, got 0", token_budget=0)
    refused(ConfigError, "seeds has a number twice", seeds=[1, 1])
    refused(ConfigError, "context must be whole numbers", context="long")
    refused(ConfigError, "there is no file", haystack="nowhere.txt")
    refused(ConfigError, "dtype must be one of", dtype="int4")
    refused(UnknownNameError, "there is no metric 'klx'; did you mean 'kl'", metrics=["klx"])


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    """Said before the first cell."""
    with pytest.raises(ConfigError, match="without config.json"):
        small_study(tmp_path).cells()
