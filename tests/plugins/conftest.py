"""Plugins made for one test: objects passed in code, and distributions on disk."""

import importlib.metadata
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine blocks is not part of a test."""
    monkeypatch.delenv("KVFRAME_DISABLE_PLUGINS", raising=False)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """A function that installs a distribution with one plugin module, found through importlib.metadata as any other.

    kvframe's own distribution, which the environment may or may not have, is hidden, so that a test knows all plugins.
    """
    found = importlib.metadata.entry_points

    def strangers(**selection: str) -> list[importlib.metadata.EntryPoint]:
        return [point for point in found(**selection) if point.dist is None or point.dist.name != "kvframe"]

    monkeypatch.setattr(importlib.metadata, "entry_points", strangers)

    def install(
        distribution: str, plugin: str, source: str = "", *, module: str | None = None, metadata: str = "dist-info"
    ) -> Path:
        module = module or distribution
        site = tmp_path / f"site-{len(list(tmp_path.iterdir()))}"
        site.mkdir()
        (site / f"{module}.py").write_text(textwrap.dedent(source))
        if metadata == "dist-info":
            folder, file = site / f"{distribution}-1.0.dist-info", "METADATA"
        else:
            folder, file = site / f"{distribution}.egg-info", "PKG-INFO"
        folder.mkdir()
        (folder / file).write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[kvframe]\n{plugin} = {module}\n")
        monkeypatch.syspath_prepend(site)
        return site

    yield install
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
