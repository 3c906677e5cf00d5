"""A page for every policy, as `kvframe pages` writes it, and module docstrings that say what such a page needs."""

from pathlib import Path

import pytest

from kvframe.pages import files_of
from kvframe.plugins import create_plugin_manager
from kvframe.registry import PolicyRecord, Registry

DOCS = Path(__file__).resolve().parents[2] / "docs"
COMMAND = "kvframe pages docs/policies --overview docs/choosing-a-policy.md --distribution kvframe"
REGISTRY = Registry(create_plugin_manager())
FILES = files_of(REGISTRY, DOCS / "policies", DOCS / "choosing-a-policy.md", "kvframe")
PUBLISHED = [
    record for record in REGISTRY.policies() if record.plugin.distribution == "kvframe" and record.paper is not None
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_page_is_up_to_date(path: Path) -> None:
    """It holds what the command would write today."""
    assert path.exists() and path.read_text(encoding="utf-8") == FILES[path], f"run: {COMMAND}"


def test_no_page_is_left_over() -> None:
    """Every page of the folder is that of a policy."""
    assert {*(DOCS / "policies").glob("*")} == {path for path in FILES if path.parent.name == "policies"}


@pytest.mark.parametrize("record", PUBLISHED, ids=lambda record: record.name)
def test_a_published_policy_names_its_paper(record: PolicyRecord) -> None:
    """Title, year, where it appeared, and the stages it fills, in the spec and in the docstring of its module."""
    about = " ".join(record.about.split())

    assert record.spec.title is not None and record.spec.title.removeprefix(f"{record.name}: ") in about
    assert str(record.spec.year) in about and str(record.paper) in about
    assert "- trigger" in about and "scorer" in about


@pytest.mark.parametrize(
    "record", [record for record in PUBLISHED if record.plugin.name == "baselines"], ids=lambda record: record.name
)
def test_a_baseline_has_a_file_of_its_own(record: PolicyRecord) -> None:
    """Named after it, and it says where ours differs from the paper."""
    assert record.config_cls.__module__ == f"kvframe_baselines.{record.name}"
    assert "Where ours differs from the paper:" in record.about
