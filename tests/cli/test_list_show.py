"""`kvframe list` and `kvframe show`."""

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import Result

import kvframe
from kvframe.registry import default_registry
from kvframe.types import Invariant

Run = Callable[..., Result]
RunJson = Callable[..., Any]
SOURCE = {"plugin", "distribution", "version"}


def test_list_names_everything(run: Run) -> None:
    """Every policy, stage and plugin stands in the tables, with the distribution it comes from."""
    text = run("list").stdout

    registry = default_registry()
    records = [*registry.policies(), *registry.stages(), *registry.plugins.records]
    assert all(record.name in text for record in records)
    assert f"louis (kvframe {kvframe.__version__})" in text
    assert "arXiv 2510.11292" in text


def test_list_as_json(run_json: RunJson) -> None:
    """The same for machines: nothing is missing."""
    found = run_json("list")

    registry = default_registry()
    assert [row["name"] for row in found["policies"]] == [record.name for record in registry.policies()]
    assert [(row["slot"], row["name"]) for row in found["stages"]] == [(r.slot, r.name) for r in registry.stages()]
    assert all(
        row.keys() == {"name", "summary", "paper", "title", "year", "traits", "needs"} | SOURCE
        for row in found["policies"]
    )
    assert all(row.keys() == {"slot", "name", "summary", "paper"} | SOURCE for row in found["stages"])
    assert [row["name"] for row in found["plugins"]] == ["core", "baselines", "louis"]


def test_list_tells_what_policies_are_like(run_json: RunJson) -> None:
    """Paper, stages, what is lost, what moves and what has to be calibrated, for machines that choose."""
    policies = {row["name"]: row for row in run_json("list")["policies"]}
    louiskv, quest, full = (policies[name] for name in ("louiskv", "quest", "full"))

    assert (quest["paper"], quest["year"], quest["needs"]) == ("arXiv 2406.10774", 2024, [])
    assert quest["title"].startswith("Quest: Query-Aware Sparsity")
    assert louiskv["traits"]["stages"]["units"] == ["decoupled", "clusters", "segments"]
    assert (louiskv["traits"]["calibrated"], quest["traits"]["calibrated"]) == (["tau"], [])
    assert (louiskv["traits"]["moves"], full["traits"]["moves"]) == ("missing rows", "nothing")
    assert {row["traits"]["loses"] for row in policies.values()} <= {"nothing", "precision", "tokens"}


def test_list_tells_of_a_blocked_plugin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that is left out is shown as such, and brings nothing."""
    monkeypatch.setenv("KVFRAME_DISABLE_PLUGINS", "baselines")
    default_registry.cache_clear()
    try:
        text = run("list").stdout
    finally:
        default_registry.cache_clear()

    assert "left out by KVFRAME_DISABLE_PLUGINS" in text and "oracle_topk" not in text


@pytest.mark.parametrize("name", [record.name for record in default_registry().policies()])
def test_show_takes_a_policy_apart(name: str, run: Run, run_json: RunJson) -> None:
    """Composition, sizes, promises and options of every policy, as text and as JSON."""
    record, made = default_registry().policy_spec(name), kvframe.policy(name)
    text, found = run("show", name).stdout, run_json("show", name)

    assert str(made) in text and record.summary in text
    assert all(invariant.value in text for invariant in made.promises)
    assert kvframe.Policy.from_dict(found["policy"]) == made
    assert found["promises"] == {invariant.name: invariant.value for invariant in made.promises}
    assert found["promises"].keys() <= Invariant.__members__.keys()
    tokens = found["tokens"]
    assert tokens["total"] == tokens["sinks"] + tokens["retrieved"] + tokens["window"]
    assert (tokens["sinks"], tokens["retrieved"]) == (made.sink_size, made.selector.capacity)
    assert found.keys() >= {"name", "summary", "paper", "options"} | SOURCE
    assert all(f"  {option['name']} = {_as_python(option['default'])!r}" in text for option in found["options"])


def _as_python(default: object) -> object:
    return tuple(default) if isinstance(default, list) else default


def test_show_explains_options(run: Run, run_json: RunJson) -> None:
    """The notes below the fields of a config, its base and the policy are told."""
    options = {option["name"]: option["help"] for option in run_json("show", "louiskv-long-input")["options"]}

    assert options["cluster_size"] == "Tokens of an average prompt cluster."
    assert options["sink_size"] == "First tokens of a sequence, always attended."
    assert "Tokens of an average prompt cluster." in run("show", "louiskv-long-input").stdout


def test_show_with_options(run_json: RunJson) -> None:
    """--set makes the policy that these options make."""
    found = run_json("show", "louiskv", "--set", "token_budget=77", "--set", "dense_layers=3")

    assert found["tokens"]["retrieved"] == 77
    assert found["policy"]["dense_layers"] == [3]
