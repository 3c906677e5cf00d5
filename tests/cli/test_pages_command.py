"""`kvframe pages`, and pages of policies unlike those that ship with kvframe."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import attrs
import pytest
from typer.testing import Result

import kvframe
from kvframe import Invariant, PolicySpec, TopBudget, hookimpl
from kvframe.pages import files_of
from kvframe.registry import Registry, default_registry

Run = Callable[..., Result]


def test_pages_are_written_once(run: Run, tmp_path: Path) -> None:
    """A page for each policy and the table of all, which links to them; nothing is left to do the second time."""
    overview, folder = tmp_path / "choose.md", tmp_path / "each"
    overview.write_text("# Choose\n\n<!-- table: overview -->\n<!-- end of table -->\n\nBelow.\n", encoding="utf-8")
    arguments = ("pages", folder, "--overview", overview, "--distribution", "kvframe")
    stale = run(*arguments, "--check", code=1).stderr
    first, second = run(*arguments).stdout, run(*arguments).stdout
    text = overview.read_text(encoding="utf-8")

    assert f"not up to date: {overview}" in stale and f"not up to date: {folder / 'quest.md'}" in stale
    pages = 1 + sum(record.plugin.distribution == "kvframe" for record in default_registry().policies())
    assert first.startswith(f"{pages} of {pages}") and second.startswith(f"0 of {pages}")
    assert run(*arguments, "--check").stderr == ""
    assert "[`quest`](each/quest.md)" in text and text.endswith("<!-- end of table -->\n\nBelow.\n")
    assert 'print(kvframe.policy("quest"))' in (folder / "quest.md").read_text(encoding="utf-8")


def test_a_page_without_a_place(fails: Callable[..., str], tmp_path: Path) -> None:
    """Nothing is written into a page that does not ask for it."""
    page = tmp_path / "other.md"
    page.write_text("# Other\n", encoding="utf-8")

    assert "no place for the table" in fails("pages", tmp_path / "each", "--overview", page)
    assert page.read_text(encoding="utf-8") == "# Other\n" and not (tmp_path / "each").exists()


@attrs.frozen(kw_only=True)
class Careless(TopBudget):
    """Promises nothing about its budget."""

    name = "careless"
    waives = frozenset({Invariant.EXACT_BUDGET})


@attrs.frozen(kw_only=True)
class CarelessConfig:
    """Takes what it likes."""


@attrs.frozen(kw_only=True)
class NeedyConfig:
    """Cannot be made without saying how much."""

    token_budget: int
    what: str = "a | b"
    """One or | the other."""


def stranger() -> Registry:
    """A registry with two policies of no distribution."""
    module = ModuleType("kv_stranger")

    @hookimpl
    def kvframe_policies() -> list[PolicySpec]:
        careless = kvframe.policy("quest").swap(name="careless", selector=Careless())
        return [
            PolicySpec(name="careless", config_cls=CarelessConfig, build=lambda config: careless),
            PolicySpec(name="needy", config_cls=NeedyConfig, build=lambda config: careless, year=2031),
        ]

    vars(module).update(KVFRAME_API_VERSION=1, kvframe_policies=kvframe_policies)
    return Registry(kvframe.create_plugin_manager(plugins=[module]))


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Their pages, and all the others."""
    return {path.stem: text for path, text in files_of(stranger(), Path("policies")).items()}


def test_waived_promises_are_told(pages: dict[str, str]) -> None:
    """What a stage waives stands in the page; a policy without options says so."""
    assert Invariant.EXACT_BUDGET.value in pages["careless"] and "## Options\n\nNone." in pages["careless"]
    assert Invariant.EXACT_BUDGET.value not in pages["quest"]


def test_a_policy_that_needs_options(pages: dict[str, str]) -> None:
    """Its page says which, instead of a composition; a bar does not end a cell."""
    page = pages["needy"]

    assert "options that have no default: `token_budget`" in page and "## Composition" not in page
    assert "| `token_budget` | (needed) |" in page and "One or &#124; the other." in page
    assert "Published as 2031." in page
