"""Who may import whom: the arrows of the house, read from the source of every module."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
STANDARD = set(sys.stdlib_module_names)
GUESTS = ("kvframe_louis", "kvframe_baselines")
ROOTS = {"kvframe": REPO, "kvframe_kernels": REPO / "kernels", **dict.fromkeys(GUESTS, REPO)}


def modules(package: str) -> list[tuple[str, Path]]:
    """Every module of a package, by its dotted name."""
    root = ROOTS[package]
    found = []
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports(name: str, path: Path, *, typed: bool = True) -> set[str]:
    """What a module imports anywhere in it, lazily included; relative names made absolute.

    typed: with what only type checkers see.
    """
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not typed:
        tree = WithoutTypeChecking().visit(tree)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


class WithoutTypeChecking(ast.NodeTransformer):
    """Drops what stands under `if TYPE_CHECKING:`."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        """Keep the other branch."""
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return [self.visit(child) for child in node.orelse]
        return self.generic_visit(node)


def strangers(package: str, known: set[str]) -> list[str]:
    """Imports of packages other than these and the standard library."""
    tops = {target.partition(".")[0] for name, path in modules(package) for target in imports(name, path)}
    return sorted(tops - known - STANDARD)


def reach(package: str, forbidden: tuple[str, ...], exempt: tuple[str, ...] = (), *, typed: bool = True) -> list[str]:
    """Imports of what is forbidden, out of modules that are not exempt."""
    return [
        f"{name} imports {target}"
        for name, path in modules(package)
        if not is_within(name, exempt)
        for target in sorted(imports(name, path, typed=typed))
        if is_within(target, forbidden)
    ]


def is_within(name: str, places: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of these places, or inside one."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


# The top of the house, and the user's API below it: these may use what is under them.
TOP_FLOOR = (
    "kvframe.cli",
    "kvframe.bench",
    "kvframe.eval",
    "kvframe.matrix",
    "kvframe.pages",
    "kvframe.testing",
    "kvframe.__main__",
)
# Modules that a decode step or the making of a policy goes through.
CORE = (
    "kvframe.attention",
    "kvframe.builtin",
    "kvframe.composition",
    "kvframe.dense_layer",
    "kvframe.errors",
    "kvframe.hookspecs",
    "kvframe.layer",
    "kvframe.memory",
    "kvframe.options",
    "kvframe.planner",
    "kvframe.plugins",
    "kvframe.quantization",
    "kvframe.registry",
    "kvframe.report",
    "kvframe.runtime",
    "kvframe.stages",
    "kvframe.stats",
    "kvframe.suggest",
    "kvframe.traits",
    "kvframe.types",
    "kvframe.validators",
)


def test_the_reader_reads(tmp_path: Path):
    """Every way to import is seen: plain, from, relative, inside a function, for type checkers, by name."""
    source = (
        "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\nif TYPE_CHECKING:\n    import h\n"
        "else:\n    import m\ndef run():\n    import i\n    import_module('j.k')\n    importlib.import_module('l')\n"
    )
    path = tmp_path / "module.py"
    path.write_text(source)
    everything = imports("x.y.module", path)

    assert everything >= {"a.b", "c", "c.d", "x.y", "x.y.e", "x.f", "x.f.g", "h", "i", "j.k", "l", "m"}
    assert imports("x.y.module", path, typed=False) == everything - {"h"}


def test_every_package_is_read():
    """The walk finds the modules there are."""
    for package in ROOTS:
        assert (package, ROOTS[package] / package / "__init__.py") in modules(package)
    assert set(CORE) <= {name for name, _ in modules("kvframe")}


def test_core_knows_no_guest():
    """Guests arrive through the entry-point group alone."""
    assert reach("kvframe", GUESTS, exempt=TOP_FLOOR) == []


def test_the_conformance_kit_knows_no_guest():
    """It checks guests and strangers alike, by what the registry says of them."""
    others = tuple(name for name, _ in modules("kvframe") if not is_within(name, ("kvframe.testing",)))
    assert reach("kvframe", GUESTS, exempt=others) == []


def test_transformers_at_the_boundary():
    """Only `kvframe.hf`, and what stands at the top, imports transformers; elsewhere only annotations name it."""
    assert reach("kvframe", ("transformers",), exempt=("kvframe.hf", *TOP_FLOOR), typed=False) == []


def test_core_does_without_the_boundary():
    """What a step or a policy goes through does not reach up to transformers, nor to what is above it."""
    above = ("transformers", "kvframe.hf", "kvframe.calibration", "kvframe.demo", *TOP_FLOOR)
    others = tuple(name for name, _ in modules("kvframe") if not is_within(name, CORE))
    assert reach("kvframe", above, exempt=others) == []


# What a room imports of the others; what is behind a dot is the one module it may see of a room.
FLOORS = {
    "types": set(),
    "errors": set(),
    "quantization": set(),
    "validators": {"errors"},
    # A transfer makes a store, and says how its rows come back.
    "stages": {
        "types",
        "errors",
        "validators",
        "memory.pool",
        "memory.codec",
        "memory.drop",
        "memory.quantized",
    },
    # The index keeps what a scorer says of units and a selector of rows.
    "memory": {"types", "errors", "quantization", "stages.scorer", "stages.selector"},
}


def room_of(module: str) -> str:
    """The room that a module of kvframe lies in."""
    return module.split(".")[1]


@pytest.mark.parametrize("room, allowed", FLOORS.items(), ids=FLOORS)
def test_ground_floors(room: str, allowed: set[str]):
    """Stages and memory lie below policy and runtime, and share a wall with a few doors; what they stand on knows
    neither."""
    places = tuple(f"kvframe.{place}" for place in {room, *allowed})
    for name, path in modules("kvframe"):
        if is_within(name, (f"kvframe.{room}",)):
            inside = {target for target in imports(name, path) if target.startswith("kvframe.")}
            # `from kvframe.memory import pool` reads as both; the second name says which module.
            found = {target for target in inside if not any(other.startswith(f"{target}.") for other in inside)}
            assert {target for target in found if not is_within(target, places)} == set(), name


def test_every_room_is_on_the_map():
    """The table of rooms in the documentation names every module of kvframe, and none that there is not."""
    page = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| room |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`kvframe/(\w+)(?:/|\.py)`", table))
    rooms = {room_of(name) for name, _ in modules("kvframe") if name not in ("kvframe", "kvframe.__main__")}

    assert named - {"__init__"} == rooms


def test_every_store_is_on_the_map():
    """So does the list of what lies in memory, for its modules."""
    page = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("\n## What lies in memory\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)\.py`", section))

    assert named == {name.split(".")[2] for name, _ in modules("kvframe") if name.startswith("kvframe.memory.")}


def test_kernels_stand_beside_the_house():
    """The kernels import torch and what compiles them, never kvframe."""
    assert strangers("kvframe_kernels", {"kvframe_kernels", "torch", "triton", "cuda"}) == []


@pytest.mark.parametrize("guest", GUESTS)
def test_guests(guest: str):
    """Guests use what a stranger's package can use, and not each other."""
    assert strangers(guest, {guest, "kvframe", "kvframe_kernels", "torch", "attrs"}) == []


@pytest.mark.parametrize("guest", GUESTS)
def test_guests_use_what_is_public(guest: str):
    """No private name of kvframe, and nothing of the boundary to transformers or the runtime."""
    hidden = ("kvframe.hf", "kvframe.runtime", "kvframe.cli", "kvframe.layer", "kvframe.dense_layer")
    for name, path in modules(guest):
        for target in imports(name, path):
            private = target.startswith("kvframe.") and any(part.startswith("_") for part in target.split("."))
            assert not private and not target.startswith(hidden), f"{name} imports {target}"


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in `sys.modules` after a statement, in a process of its own."""
    command = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    # -P: the checkout's own folders are not importable by their names
    done = subprocess.run(
        [sys.executable, "-P", "-c", command], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import kvframe",
        "import kvframe; kvframe.policy('louiskv').to_dict(); kvframe.registry.default_registry().stages()",
    ],
)
def test_importing_kvframe_is_cheap(statement: str):
    """Neither importing it nor making a policy loads transformers or triton."""
    loaded = loaded_by(statement)

    assert "kvframe" in loaded and "torch" in loaded
    assert not loaded & {"transformers", "triton", "tokenizers", "typer", "rich"}


def test_plugins_arrive_with_the_registry():
    """Importing kvframe loads no guest; asking for a policy does."""
    assert not loaded_by("import kvframe") & set(GUESTS)
    assert loaded_by("import kvframe; kvframe.policy('louiskv')") >= set(GUESTS)
