"""Study files, and `kvframe ablate` on them."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from eval.studies import CONTEXT, save_tiny_model
from typer.testing import CliRunner, Result

from kvframe.cli.app import app
from kvframe.errors import StudyFileError
from kvframe.eval.store import Store
from kvframe.eval.studyfile import MODULE, StudyFile

STUDY = """
import kvframe, kvframe.eval
study = kvframe.eval.Study(
    title="A tiny study",
    model={model!r},
    tasks=kvframe.eval.task("copy", copy_tokens=12, cue_tokens=4),
    base=kvframe.policy("louiskv", sink_size=4, window_size=16, dense_layers=(0,)),
    vary={{"trigger": [kvframe.Once()]}},
    token_budget=16, context={context}, watch=8,
)
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No study of another test is loaded; the terminal is wide."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    sys.modules.pop(MODULE, None)
    yield
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a directory."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def study(model: Path, tmp_path: Path) -> Path:
    """A study file."""
    path = tmp_path / "study.py"
    path.write_text(STUDY.format(model=str(model), context=CONTEXT))
    return path


needs_report = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jinja2", "matplotlib", "scipy")),
    reason="a report needs pip install 'kvframe[eval]'",
)


def run(*arguments: object, code: int = 0) -> Result:
    """Run a command in this process and check its exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def read(folder: Path, text: str) -> StudyFile:
    """A study file with this text."""
    path = folder / "bad.py"
    path.write_text(text)
    return StudyFile.read(path)


def test_a_study_that_raises(tmp_path: Path) -> None:
    """The traceback begins in the file, and says which line."""
    file = read(tmp_path, "import kvframe\n\ndef make():\n    return kvframe.policy('luiskv')\n\nstudy = make()\n")
    with pytest.raises(StudyFileError) as caught:
        file.study()

    message = str(caught.value)
    assert message.startswith(f"the study {file.path} raises an error:\nTraceback")
    assert f'File "{file.path}", line 6, in <module>\n    study = make()' in message
    assert "studyfile.py" not in message and message.endswith("louiskv-long-output, ...)") is False
    assert "no policy named 'luiskv'; did you mean 'louiskv'?" in message


@pytest.mark.parametrize(
    "text, part",
    [
        ("this is no Python", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = 1", "defines no `study`; expected `study = kvframe.eval.Study"),
        ("study = {}", "has a `study` of type dict"),
    ],
)
def test_what_is_no_study(text: str, part: str, tmp_path: Path) -> None:
    """Each with what was expected."""
    with pytest.raises(StudyFileError, match=re.escape(part)):
        read(tmp_path, text).study()


def test_a_study_by_another_name(study: Path) -> None:
    """The way out is said."""
    study.write_text(study.read_text().replace("study = ", "mine = "))
    with pytest.raises(StudyFileError, match="rename 'mine'"):
        StudyFile.read(study).study()


def test_what_lies_beside_it_can_be_imported(study: Path) -> None:
    """As for a script."""
    (study.parent / "beside_the_study.py").write_text("TITLE = 'from beside'\n")
    study.write_text(study.read_text().replace('"A tiny study"', "TITLE") + "\n")
    study.write_text("from beside_the_study import TITLE\n" + study.read_text())
    try:
        assert StudyFile.read(study).study().title == "from beside"
    finally:
        sys.modules.pop("beside_the_study", None)
        sys.path.remove(str(study.parent))


def test_no_file(tmp_path: Path) -> None:
    """One line, exit code 2."""
    result = run("ablate", tmp_path / "nowhere.py", code=2)

    assert result.stderr.startswith("error: cannot read the study") and result.stdout == ""


def test_dry_run(study: Path) -> None:
    """Lists every cell with predicted memory and time, and runs and writes nothing."""
    found = json.loads(run("ablate", study, "--dry-run", "--json").stdout)
    shown = run("ablate", study, "--dry-run").stdout

    assert [(cell["label"], cell["kind"]) for cell in found["cells"]] == [
        ("louiskv", "score"), ("trigger: once", "score"), ("louiskv", "watch"), ("trigger: once", "watch")
    ]  # fmt: skip
    for cell in found["cells"]:
        assert cell["predicted"]["device_bytes"] > 0 and cell["predicted"]["seconds"] > 0 and cell["predicted"]["fits"]
    assert "trigger: once" in shown and "4 cells, 0 of them done" in shown
    assert [path.name for path in study.parent.iterdir()] == ["study.py"]


@needs_report
def test_run_and_run_again(study: Path) -> None:
    """Runs every cell, writes the report, and has nothing to do the second time; figures are the same."""
    first = run("ablate", study, "--engine", "inline")
    page = study.with_suffix(".md")
    again = run("ablate", study, "--engine", "inline", "--json", "--markdown", page)
    found = json.loads(again.stdout)

    assert "[4/4]" in first.stderr and "[1/4] louiskv @16, copy, 320 tokens, seed 0:" in first.stderr
    assert again.stderr == ""
    report = study.with_suffix(".report")
    assert first.stdout.splitlines()[-1] == f"report: {report / 'index.html'}" and (report / "index.html").is_file()
    figures = {cell["label"]: cell["figures"] for cell in found["cells"] if cell["kind"] == "score"}
    for label, own in figures.items():
        row = next(line for line in first.stdout.splitlines() if line.startswith(label))
        assert f"{own['score']:.1%}" in row and f"{own['kl']:.4f}" in row
    assert f"{figures['louiskv']['kl']:.4f}" in page.read_text()
    page.unlink()
    assert sorted(path.name for path in study.parent.iterdir()) == ["study.py", "study.report", "study.results.sqlite"]
    assert "3 of them" not in run("ablate", study, "--dry-run").stdout


@needs_report
def test_a_failed_cell_is_exit_code_1(study: Path) -> None:
    """With its reason on the terminal and its traceback in the report."""
    study.write_text(study.read_text().replace("copy_tokens=12", "copy_tokens=1000").replace("watch=8", "watch=0"))
    result = run("ablate", study, "--engine", "inline", code=1)

    assert "failed: louiskv @16, copy, 320 tokens, seed 0: " in result.stdout
    page = (study.with_suffix(".report") / "index.html").read_text()
    assert "Cells that failed" in page and "Traceback (most recent call last)" in page


@needs_report
@pytest.mark.parametrize(
    "options, part",
    [
        (("--engine", "rey"), "--engine must be one of local, inline, ray"),
        (("--haystack", "nowhere.txt"), "there is no file nowhere.txt"),
        (("--report", "nowhere/at/all"), "there is no directory"),
        (("--results", "nowhere/results.sqlite"), "there is no directory"),
        (("--markdown", "nowhere/page.md"), "there is no directory"),
    ],
)
def test_refusals(options: tuple[str, ...], part: str, study: Path) -> None:
    """One line, exit code 2, nothing written."""
    result = run("ablate", study, *options, code=2)

    assert part in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert [path.name for path in study.parent.iterdir()] == ["study.py"]


@needs_report
def test_a_context_beyond_the_model(study: Path) -> None:
    """Said before the first cell runs."""
    study.write_text(study.read_text().replace(f"context={CONTEXT}", "context=5000"))
    result = run("ablate", study, "--engine", "inline", code=2)

    assert "Study.context has 5000 tokens, the model reads at most 1024" in result.stderr


@needs_report
def test_results_of_another_format(study: Path) -> None:
    """Are not touched."""
    import sqlite3

    path = study.with_suffix(".results.sqlite")
    Store(path).close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    before = path.read_bytes()

    result: Any = run("ablate", study, "--engine", "inline", code=2)
    assert "has format 99" in result.stderr and path.read_bytes() == before
