"""docs/hooks.md against kvframe.hookspecs."""

import inspect
import re
from pathlib import Path

import pytest

from kvframe import hookspecs
from kvframe.plugins import HOOKS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hooks.md"


def sections() -> dict[str, str]:
    """Text by heading, for headings that name a hook."""
    parts = re.split(r"^## `?(kvframe_\w+\([^)]*\))`?$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def signature(hook: str) -> str:
    """A hook as its heading has it."""
    return f"{hook}({', '.join(inspect.signature(getattr(hookspecs, hook)).parameters)})"


def test_every_hook_is_a_heading_with_its_arguments() -> None:
    """In the order of hookspecs, and none that there is not."""
    assert list(sections()) == [signature(hook) for hook in HOOKS]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_argument_is_explained(hook: str) -> None:
    """A section names each argument, and says whether the first answer wins."""
    text = sections()[signature(hook)]
    first_wins = bool(getattr(hookspecs, hook).kvframe_spec["firstresult"])

    assert all(f"`{name}`" in text for name in inspect.signature(getattr(hookspecs, hook)).parameters)
    assert ("First answer wins." in text) == first_wins


def test_api_version_is_the_one_of_now() -> None:
    """The page shows the version that a plugin has to state."""
    assert f"KVFRAME_API_VERSION = {hookspecs.API_VERSION}" in PAGE.read_text(encoding="utf-8")
