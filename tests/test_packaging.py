"""What is installed, under which names, and with which versions."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kvframe

REPO = Path(__file__).resolve().parent.parent
PACKAGES = {"kvframe", "kvframe_baselines", "kvframe_kernels", "kvframe_louis"}
SOURCES = [REPO / "kernels" / name if name == "kvframe_kernels" else REPO / name for name in sorted(PACKAGES)]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# What the published torch asks for on Linux. A build for CPUs only leaves it out of its metadata.
TRITON_OF_TORCH = {"2.13.0": "3.7.1"}


def read_constraints() -> dict[str, Requirement]:
    """The pins of constraints.txt by normalised name."""
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def version_of(pin: Requirement) -> str:
    """The one version that `pin` allows."""
    (specifier,) = pin.specifier
    return specifier.version


def requirements(lines: list[str], extras: set[str]) -> Iterator[Requirement]:
    """The requirements among `lines` that hold on this machine with `extras`."""
    for requirement in map(Requirement, lines):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield requirement


def required_by_tests() -> Iterator[tuple[str, Requirement]]:
    """Everything that .[test] asks for, and everything that asks for in turn, each with who asks."""
    lines = sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])
    waiting = [("kvframe", wanted) for wanted in requirements(lines, set()) if wanted.name != "kvframe"]
    seen = set()
    while waiting:
        asker, wanted = waiting.pop()
        yield asker, wanted
        name = canonicalize_name(wanted.name)
        if (name, *sorted(wanted.extras)) not in seen:
            seen.add((name, *sorted(wanted.extras)))
            asked = importlib.metadata.requires(name) or []
            waiting += [(name, further) for further in requirements(asked, wanted.extras)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources: a build in the checkout would reuse what an earlier one left."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(REPO / name, folder)
    for source in SOURCES:
        shutil.copytree(
            source, folder / source.relative_to(REPO), ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    # neighbours of the packages, which must stay out
    for name in ("tests", "docs", "kernels/benchmarks"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    command = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", command, str(folder)], cwd=folder, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_kernels_folder_has_no_init() -> None:
    """The folder kernels/ is no package, since one would shadow the package that transformers looks for."""
    assert not (REPO / "kernels" / "__init__.py").exists()


def test_kernels_name_resolves_outside_the_checkout() -> None:
    """The name `kernels` never means a regular package of the checkout."""
    spec = importlib.util.find_spec("kernels")
    origin = spec.origin if spec else None

    assert origin is None or not Path(origin).is_relative_to(REPO)


def test_checkout_holds_no_other_top_level_package() -> None:
    """Nothing beside the four packages can be imported as a package from the checkout or from kernels/."""
    found = {path.parent.name for folder in (REPO, REPO / "kernels") for path in folder.glob("*/__init__.py")}

    assert found == PACKAGES


def test_every_folder_with_modules_is_a_package() -> None:
    """Each folder that holds modules has an __init__.py, without which the wheel would lack it."""
    folders = {module.parent for source in SOURCES for module in source.rglob("*.py")}

    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_wheel_holds_the_four_packages_only(wheel: Path) -> None:
    """The wheel's top level is the four packages and its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top_level = {name.partition("/")[0] for name in names}

    assert {name for name in top_level if not name.endswith(".dist-info")} == PACKAGES
    assert len(top_level) == len(PACKAGES) + 1


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    """Modules, py.typed marks, kernel sources and the report's template are all in the wheel."""
    kinds = {".py", ".typed", ".cu", ".cuh", ".cpp", ".html", ".css", ".js"}
    expected = {
        path.relative_to(source.parent).as_posix()
        for source in SOURCES
        for path in source.rglob("*")
        if path.suffix in kinds
    }
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if Path(name).suffix in kinds} == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected


def test_wheel_states_licence_script_and_plugins(wheel: Path) -> None:
    """The wheel's metadata names the licence, the command and the two plugin packages."""
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()

    assert "License-Expression: Apache-2.0\n" in metadata
    assert "kvframe = kvframe.cli:main\n" in entry_points
    assert "baselines = kvframe_baselines\nlouis = kvframe_louis\n" in entry_points


def test_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Unpacked anywhere, the wheel's packages import from there."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    names = sorted(PACKAGES)
    code = f"import {', '.join(names)}; print(*(package.__file__ for package in ({', '.join(names)})))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / name / "__init__.py") for name in names]


@pytest.mark.parametrize("module", ["kvframe", "kvframe.models", "kvframe_kernels"])
def test_import_leaves_heavy_packages_unloaded(module: str) -> None:
    """Importing kvframe loads neither transformers nor triton, which take seconds and may be absent."""
    code = f"import sys, {module}; print(*({{'transformers', 'triton'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_package_tells_the_version_of_the_project() -> None:
    """The version that the package tells is the one in pyproject.toml."""
    assert kvframe.__version__ == PROJECT["version"]


def test_constraints_are_plain_exact_pins() -> None:
    """Each constraint is one public version, so that any registry can serve it."""
    for pin in read_constraints().values():
        assert str(pin) == f"{pin.name}=={version_of(pin)}"
        assert re.fullmatch(r"[0-9.]+", version_of(pin)), pin


def test_constraints_fit_all_that_the_tests_install() -> None:
    """All that .[test] brings, transitively, is pinned to a version that everyone who asks for it accepts."""
    pins = read_constraints()
    unmet = [
        f"{asker} asks for {wanted}, constraints.txt has {pins.get(canonicalize_name(wanted.name), 'no pin')}"
        for asker, wanted in required_by_tests()
        if (pin := pins.get(canonicalize_name(wanted.name))) is None
        or not wanted.specifier.contains(version_of(pin), prereleases=True)
    ]

    assert unmet == []


def test_constraints_pin_the_triton_of_the_pinned_torch() -> None:
    """Triton is pinned to what the published torch of the pinned version asks for."""
    pins = read_constraints()

    assert version_of(pins["triton"]) == TRITON_OF_TORCH[version_of(pins["torch"])]


@pytest.mark.parametrize("mark", ["demo-line", "test-line"])
def test_readme_block_is_one_command_line(mark: str) -> None:
    """The README's marked block is a single line that a reader can copy, and that .ci/run can run."""
    blocks = re.findall(rf"^<!-- {mark} -->\n```bash\n(.*?)\n```$", (REPO / "README.md").read_text(), re.M | re.S)

    assert len(blocks) == 1
    assert "\n" not in blocks[0]
    assert "-c constraints.txt" in blocks[0]
