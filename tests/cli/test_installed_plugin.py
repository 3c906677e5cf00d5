"""A stranger's package, installed with pip: found, run, conforming; and every way in which one can be at fault.

What is broken is a copy of what pip installed, changed in one place, and is found as any installed package is.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.words import TEXT
from typer.testing import Result

import kvframe
from kvframe.plugins import PluginWarning
from kvframe.registry import default_registry

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "kvframe_example_policy"
MODULE, DISTRIBUTION = "kvframe_example_policy", "kvframe-example-policy 0.1.0"
SMALL = [f"--set={each}" for each in ("token_budget=16", "page_size=4", "sink_size=4", "window_size=8")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the example, without its dependencies, which are here already."""
    folder = tmp_path_factory.mktemp("installed")
    # A copy, as building leaves files beside the sources.
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def python_path(site: Path) -> dict[str, str]:
    """An environment in which the package is installed, beside the kvframe that is tested."""
    root = Path(kvframe.__file__).parents[1]
    paths = [str(site), str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "200"}


def kvframe_json(site: Path, *arguments: object) -> Any:
    """What a command prints, in a process of its own."""
    script = Path(sys.executable).parent / "kvframe"
    command = [script, *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=python_path(site), timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_found(site: Path) -> None:
    """`kvframe list` has the stages and the policy, and says whose they are."""
    found = kvframe_json(site, "list")
    own = {"plugin": "example", "distribution": "kvframe-example-policy", "version": "0.1.0"}
    stages = {(row["slot"], row["name"]) for row in found["stages"] if row["plugin"] == "example"}
    (policy,) = (row for row in found["policies"] if row["name"] == "steady-pages")

    assert stages == {("trigger", "adaptive-stride"), ("scorer", "key-direction")}
    assert policy.items() >= own.items()
    assert policy["summary"].startswith("Pages by the direction of their keys")


def test_generates(site: Path, tiny_model: Path) -> None:
    """`kvframe generate` runs it by its name, with its options, and it retrieves."""
    call = ("generate", tiny_model, "--prompt", TEXT * 6, "--max-new-tokens", 12, "--policy", "steady-pages")
    found = kvframe_json(site, *call, *SMALL)
    report = found["report"]

    assert found["new_tokens"] == 12
    assert (report["policy"]["name"], report["policy"]["scorer"]["stage"]) == ("steady-pages", "key-direction")
    assert report["attended_retrieved"] == 16 and report["rows_recalled"] > 0


def test_conforms(site: Path, tmp_path: Path) -> None:
    """Its own tests pass, the conformance kit among them."""
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=quick"]
    done = subprocess.run(command, cwd=tmp_path, env=python_path(site), capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


# ---- at fault -------------------------------------------------------------------------------------------------------

Break = Callable[..., Path]


@pytest.fixture
def variant(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Break]:
    """A function that installs the package with a text of one of its files changed, perhaps under another name."""

    def install(
        file: str = "", old: str = "", new: str = "", *, name: str = MODULE, plugin: str = "example", entry: str = ""
    ) -> Path:
        folder = tmp_path / f"site-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(site, folder, ignore=shutil.ignore_patterns("__pycache__"))
        if file:
            path = folder / MODULE / file
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new))
        (info,) = folder.glob("*.dist-info")
        (info / "entry_points.txt").write_text(f"[kvframe]\n{plugin} = {entry or name}\n")
        if name != MODULE:
            for path in [*(folder / MODULE).glob("*.py"), info / "METADATA"]:
                path.write_text(path.read_text().replace(MODULE, name).replace(MODULE.replace("_", "-"), name))
            (folder / MODULE).rename(folder / name)
            info.rename(folder / f"{name}-0.1.0.dist-info")
        monkeypatch.syspath_prepend(folder)
        return folder

    forget_modules()
    yield install
    forget_modules()


def forget_modules() -> None:
    """Whatever was imported of the package, here or by other tests, is imported anew."""
    default_registry.cache_clear()
    for module in list(sys.modules):
        if module.partition(".")[0] in (MODULE, "rival"):
            del sys.modules[module]


Fails = Callable[..., str]

AT_FAULT = {
    "failed import": (
        ("__init__.py", "import kvframe\n", "import kvfarme\n"),
        f"plugin 'example' from {DISTRIBUTION} (kvframe_example_policy) failed to import: ModuleNotFoundError: "
        "No module named 'kvfarme'; repair or uninstall it, or block it with KVFRAME_DISABLE_PLUGINS",
    ),
    "failed import below": (
        ("trigger.py", "from kvframe.validators import finite_number", "from kvframe.validators import finite"),
        f"plugin 'example' from {DISTRIBUTION} (kvframe_example_policy) failed to import: ImportError: "
        "cannot import name 'finite'",
    ),
    "misspelt hook": (
        ("__init__.py", "def kvframe_stages", "def kvframe_stage"),
        f"plugin 'example' from {DISTRIBUTION} implements unknown hook 'kvframe_stage'; did you mean 'kvframe_stages'?",
    ),
    "missing marker": (
        ("__init__.py", "@kvframe.hookimpl\ndef kvframe_stages", "def kvframe_stages"),
        f"plugin 'example' from {DISTRIBUTION} has a 'kvframe_stages' that is not marked; "
        "write @kvframe.hookimpl above the function",
    ),
    "wrong argument": (
        ("__init__.py", "def kvframe_stages()", "def kvframe_stages(registry)"),
        f"plugin 'example' from {DISTRIBUTION} does not fit its hooks: ",
    ),
    "older API": (
        ("__init__.py", "KVFRAME_API_VERSION = 1", "KVFRAME_API_VERSION = 0"),
        f"plugin 'example' from {DISTRIBUTION} was written for plugin API 0, this kvframe provides 1; ",
    ),
    "no API version": (
        ("__init__.py", "KVFRAME_API_VERSION = 1", ""),
        f"plugin 'example' from {DISTRIBUTION} does not say which plugin API it was written for; "
        "write KVFRAME_API_VERSION = 1 into kvframe_example_policy",
    ),
    "no list": (
        ("__init__.py", "[kvframe.StageSpec(AdaptiveStride), kvframe.StageSpec(KeyDirection)]", "None"),
        f"plugin 'example' from {DISTRIBUTION}: kvframe_stages returned None, expected an iterable of StageSpec",
    ),
    "an instance instead of a class": (
        ("__init__.py", "kvframe.StageSpec(KeyDirection)", "kvframe.StageSpec(KeyDirection())"),
        f"plugin 'example' from {DISTRIBUTION}: a StageSpec holds KeyDirection(), expected a class derived from one of",
    ),
    "slot of another class": (
        ("scorer.py", "    name: ClassVar", '    slot: ClassVar[str] = "trigger"\n    name: ClassVar'),
        f"plugin 'example' from {DISTRIBUTION}: stage kvframe_example_policy.scorer.KeyDirection has slot 'trigger', "
        "but is no Trigger; derive it from that class",
    ),
    "slot that does not exist": (
        ("scorer.py", "    name: ClassVar", '    slot: ClassVar[str] = "scorers"\n    name: ClassVar'),
        f"plugin 'example' from {DISTRIBUTION}: stage kvframe_example_policy.scorer.KeyDirection has slot 'scorers'; "
        "did you mean 'scorer'?",
    ),
    "method missing": (
        ("scorer.py", "    def score(", "    def scores("),
        f"plugin 'example' from {DISTRIBUTION}: stage kvframe_example_policy.scorer.KeyDirection is abstract; "
        "it still has to define score",
    ),
    "not attrs": (
        ("scorer.py", "@frozen(kw_only=True)\n", ""),
        "KeyDirection is not an attrs class; write @attrs.frozen(kw_only=True) above it",
    ),
    "odd name": (
        ("scorer.py", '"key-direction"', '"Key Direction"'),
        "KeyDirection has the name 'Key Direction', expected kebab-case text such as 'mean-key'",
    ),
    "name of one of kvframe's stages": (
        ("scorer.py", '"key-direction"', '"mean-key"'),
        "scorer 'mean-key' is registered twice: kvframe.stages.scorer.MeanKey",
    ),
    "name of another plugin's policy": (
        ("__init__.py", '"steady-pages"', '"louiskv"'),
        "policy 'louiskv' is registered twice: kvframe_example_policy.policy.SteadyPagesConfig (plugin 'example' from "
        f"{DISTRIBUTION}) and kvframe_louis.policy.LouisKVConfig (plugin 'louis' from kvframe",
    ),
}


@pytest.mark.parametrize("change, message", AT_FAULT.values(), ids=AT_FAULT)
def test_plugin_at_fault(change: tuple[str, str, str], message: str, variant: Break, fails: Fails) -> None:
    """Any command that needs the registry says whose fault it is, and what to do."""
    variant(*change)

    assert message in fails("list")


BUILT_WRONG = {
    "stage in the wrong slot": (
        ("policy.py", "scorer=KeyDirection()", "scorer=AdaptiveStride()"),
        "the scorer slot takes a Scorer, but AdaptiveStride(tau=0.8, max_stride=16) is a Trigger; pass it as "
        "trigger=...",
    ),
    "class instead of a stage": (
        ("policy.py", "scorer=KeyDirection()", "scorer=KeyDirection"),
        "the scorer slot takes an instance, got the class KeyDirection; write KeyDirection()",
    ),
    "no policy": (
        ("policy.py", "    return kvframe.Policy(", "    kvframe.Policy("),
        f"plugin 'example' from {DISTRIBUTION}: build of policy 'steady-pages' returned None, expected a Policy",
    ),
}


@pytest.mark.parametrize("change, message", BUILT_WRONG.values(), ids=BUILT_WRONG)
def test_policy_built_wrong(change: tuple[str, str, str], message: str, variant: Break, fails: Fails) -> None:
    """A policy that cannot be made is listed, and says what is wrong where it is asked for."""
    variant(*change)

    assert message in fails("show", "steady-pages")


def test_two_distributions_one_plugin_name(variant: Break, fails: Fails) -> None:
    """Both are named, with their modules."""
    variant()
    variant(name="rival")

    assert fails("list") == (
        f"plugin name 'example' is claimed by 2 distributions: {DISTRIBUTION} (kvframe_example_policy), "
        "rival 0.1.0 (rival); uninstall one, or block it with KVFRAME_DISABLE_PLUGINS"
    )


def test_two_distributions_one_stage_name(variant: Break, fails: Fails) -> None:
    """Neither replaces the other."""
    variant()
    variant(name="rival", plugin="rival")

    assert fails("list") == (
        "trigger 'adaptive-stride' is registered twice: kvframe_example_policy.trigger.AdaptiveStride "
        f"(plugin 'example' from {DISTRIBUTION}) and rival.trigger.AdaptiveStride (plugin 'rival' from rival 0.1.0); "
        "rename one, or block its plugin with KVFRAME_DISABLE_PLUGINS"
    )


def test_names_and_options_that_are_not_there(variant: Break, fails: Fails) -> None:
    """What was meant, of a stranger's as of kvframe's own."""
    variant()

    assert "no policy named 'steady-page'; did you mean 'steady-pages'?" in fails("show", "steady-page")
    assert (
        "SteadyPagesConfig has no option 'page_sise'; did you mean 'page_size'? (options: token_budget, page_size,"
        in fails("show", "steady-pages", "--set", "page_sise=4")
    )
    assert "AdaptiveStride.max_stride must be an integer >= 1, got 0" in fails(
        "show", "steady-pages", "--set", "max_stride=0"
    )


def test_no_hook_warns(variant: Break, run: Callable[..., Result]) -> None:
    """An entry point that names the wrong module brings nothing; whoever installed it is told."""
    variant("trigger.py", "\n\n@define", "\n\nKVFRAME_API_VERSION = 1\n\n\n@define", entry=f"{MODULE}.trigger")

    with pytest.warns(PluginWarning, match=rf"plugin 'example' from {DISTRIBUTION} .* implements no hook; mark"):
        listed = run("list").stdout

    assert "steady-pages" not in listed


def test_what_is_broken_can_be_blocked(
    variant: Break, run: Callable[..., Result], fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way out that the message names: everything else works, and says what was left out."""
    variant("__init__.py", "import kvframe\n", "import kvfarme\n")
    monkeypatch.setenv("KVFRAME_DISABLE_PLUGINS", "example")

    assert "left out by KVFRAME_DISABLE_PLUGINS" in run("list").stdout
    assert "KVFRAME_DISABLE_PLUGINS leaves out: example" in fails("show", "steady-pages")
