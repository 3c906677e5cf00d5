"""Every code block of the documentation runs, prints what the page says it prints, and calls commands that exist.

A page's `python` blocks run in order and share their names, as in one script. A `text` block right behind one is what
it prints; `...` stands for anything, as in doctest. A mark stands in a comment on the line above the block:

    <!-- model -->          needs the files of SmolLM2; the marked blocks of a page run on their own
    <!-- not run: why -->   is shown only, and still has to be Python
    <!-- file: path -->     is that file, whole; its package can be imported by the other blocks
    <!-- run -->            of a `console` block: its `kvframe` commands run, and print the lines below them

Commands in other `console` and `bash` blocks are parsed: command, options and arguments have to exist.
"""

import doctest
import io
import re
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from attrs import evolve, frozen
from typer.testing import CliRunner

from kvframe.cli.app import app
from kvframe.cli.replay import variants
from kvframe.eval.tasks import TASKS
from kvframe.options import parse_options
from kvframe.registry import default_registry

REPO = Path(__file__).resolve().parents[2]
PACKAGES = [path.parent for path in (REPO / "examples").glob("*/pyproject.toml")]
PAGES = [*sorted((REPO / "docs").rglob("*.md")), REPO / "README.md"]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^`]*$")
_MARK = re.compile(r"^ *<!-- (?P<mark>[^>]*?) -->$")


@frozen(kw_only=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Of its opening fence, from 1."""
    language: str
    text: str
    mark: str = ""
    output: str | None = None
    """What a `text` block right behind it shows."""

    @property
    def where(self) -> str:
        """For messages, such as docs/quickstart.md:12."""
        return f"{self.page.relative_to(REPO)}:{self.line}"

    @property
    def runs(self) -> bool:
        """Is it Python that runs with every test?"""
        return self.language == "python" and not self.mark

    @property
    def needs_model(self) -> bool:
        """Is it Python that runs with the real model?"""
        return self.language == "python" and self.mark == "model"


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, each `text` block also as the output of the Python above it."""
    found: list[Block] = []
    adjacent = False  # nothing but blank lines since the last block
    mark = ""
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    for number, line in lines:
        fence = _FENCE.match(line)
        if fence is None:
            marked = _MARK.match(line)
            mark = marked["mark"] if marked else ""
            adjacent = adjacent and not line.strip()
            continue
        indent, language = fence["indent"], fence["language"]
        inside = []
        for _, body in lines:
            if body.strip() == "```":
                break
            inside.append(body.removeprefix(indent))
        else:
            pytest.fail(f"{page}:{number}: the block does not end")
        text = "\n".join(inside) + "\n"
        if language == "text" and adjacent and found[-1].language == "python":
            last = found.pop()
            found.append(
                Block(
                    page=last.page,
                    line=last.line,
                    language=last.language,
                    text=last.text,
                    mark=last.mark,
                    output=text,
                )
            )
        found.append(Block(page=page, line=number, language=language, text=textwrap.dedent(text), mark=mark))
        adjacent, mark = True, ""
    return found


BLOCKS = {page: blocks_of(page) for page in PAGES}


def pages_with(attribute: str) -> list[object]:
    """A parameter for each page that has such blocks."""
    return [
        pytest.param([block for block in blocks if getattr(block, attribute)], id=str(page.relative_to(REPO)))
        for page, blocks in BLOCKS.items()
        if any(getattr(block, attribute) for block in blocks)
    ]


def run(blocks: Iterable[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run blocks as one module, which stages defined in them can be traced to."""
    for package in PACKAGES:
        monkeypatch.syspath_prepend(package)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            # the blank lines make a traceback show the page's own line numbers
            code = compile("\n" * block.line + block.text, block.where, "exec", dont_inherit=True)
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(code, vars(module))
            if block.output is not None:
                check_output(block, printed.getvalue())


def check_output(block: Block, printed: str) -> None:
    """Fail unless a block printed what the page shows."""
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert block.output is not None
    if not doctest.OutputChecker().check_output(block.output, printed, options):
        pytest.fail(f"{block.where} prints\n{printed}\nbut the page shows\n{block.output}", pytrace=False)


@pytest.mark.parametrize("blocks", pages_with("runs"))
def test_python_runs(blocks: list[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who copies a page's Python gets what the page shows."""
    run(blocks, monkeypatch)


@pytest.mark.model
@pytest.mark.parametrize("blocks", pages_with("needs_model"))
def test_python_runs_with_the_model(blocks: list[Block], monkeypatch: pytest.MonkeyPatch, smollm2: object) -> None:
    """So do the blocks that load SmolLM2."""
    run(blocks, monkeypatch)


def test_marks_are_known() -> None:
    """A misspelt mark would silently run or leave out a block."""
    odd = [
        f"{block.where}: {block.mark}"
        for blocks in BLOCKS.values()
        for block in blocks
        if block.language == "python"
        and block.mark not in ("", "model")
        and not block.mark.startswith(("not run: ", "file: "))
    ]

    assert odd == []


FILES = [
    pytest.param(block, id=block.where)
    for blocks in BLOCKS.values()
    for block in blocks
    if block.mark.startswith("file: ")
]


@pytest.mark.parametrize("block", FILES)
def test_files_are_shown_as_they_are(block: Block) -> None:
    """A block that stands for a file is that file."""
    assert (REPO / block.mark.removeprefix("file: ")).read_text(encoding="utf-8") == block.text


def test_the_tutorial_shows_the_whole_package() -> None:
    """Whoever copies the blocks has the example, but for its README."""
    shown = {REPO / block.values[0].mark.removeprefix("file: ") for block in FILES}

    for package in PACKAGES:
        files = {path for path in package.rglob("*") if path.suffix in (".py", ".toml") and "build" not in path.parts}
        assert files <= shown


def test_other_python_is_python() -> None:
    """What is shown only has no typing errors either."""
    for blocks in BLOCKS.values():
        for block in blocks:
            if block.language == "python":
                compile(block.text, block.where, "exec", dont_inherit=True)


def commands_of(block: Block) -> list[tuple[list[str], str]]:
    """Each call of `kvframe` in a block of shell text, and the lines below it."""
    calls: list[tuple[list[str], str]] = []
    for line in block.text.replace("\\\n", " ").splitlines(keepends=True):
        if block.language == "console" and not line.startswith("$ "):
            if calls:
                calls[-1] = (calls[-1][0], calls[-1][1] + line)
            continue
        words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        words.whitespace_split = True
        call: list[str] = []
        for word in [*words, ";"]:
            if word in ("&&", "||", "|", ";"):
                if call[:1] == ["kvframe"]:
                    calls.append((call[1:], ""))
                call = []
            else:
                call.append(word)
    return calls


def check_call(arguments: list[str]) -> None:
    """Raise unless command, options and arguments exist and the policy or task takes what `--set` gives it."""
    group: Any = typer.main.get_command(app)
    given = [argument for argument in arguments if argument != "--debug"]
    command = group.commands[given.pop(0)]
    while hasattr(command, "commands"):
        command = command.commands[given.pop(0)]
    context = command.context_class(command, info_name=command.name)
    options, left_over, _ = command.make_parser(context).parse_args(args=given)
    assert left_over == [], f"too many arguments: {left_over}"
    missing = [parameter.name for parameter in command.params if parameter.required and not options.get(parameter.name)]
    assert missing == [], f"missing: {missing}"
    if options.get("set_"):
        configured = {parameter.name: options.get(parameter.name) or parameter.default for parameter in command.params}
        if "task" in configured:
            kind = TASKS[configured["task"]]
            kind(**parse_options(kind, options["set_"]))
        elif "policies" in configured:
            list(variants(configured["policies"].split(","), options["set_"], options.get("vary") or []))
        else:
            record = default_registry().policy_spec(configured["policy"])
            record.make(**parse_options(record.config_cls, options["set_"]))


SHELL = [
    pytest.param(block, id=block.where)
    for blocks in BLOCKS.values()
    for block in blocks
    if block.language in ("bash", "console") and commands_of(block)
]


@pytest.mark.parametrize("block", SHELL)
def test_commands_exist(block: Block) -> None:
    """A command that a reader copies is one that there is."""
    for arguments, _ in commands_of(block):
        check_call(arguments)


@pytest.mark.parametrize("block", [block for block in SHELL if block.values[0].mark == "run"])
def test_commands_print(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """A marked one prints what the page shows."""
    monkeypatch.setenv("COLUMNS", "120")
    for arguments, shown in commands_of(block):
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)

        assert result.exit_code == 0
        check_output(evolve(block, output=shown), result.output)


def test_toml_is_toml() -> None:
    """So is TOML."""
    for blocks in BLOCKS.values():
        for block in blocks:
            if block.language == "toml":
                tomllib.loads(block.text)
