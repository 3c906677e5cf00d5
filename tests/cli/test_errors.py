"""What a command says where it cannot do what was asked, and how it is called."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import kvframe
from kvframe.errors import UnknownNameError

Run = Callable[..., Result]
Fails = Callable[..., str]

COMMANDS = ["demo", "generate", "show", "calibrate", "doctor", "families", "list", "plan", "bench"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("show", "luiskv"), ("no policy named 'luiskv'", "did you mean 'louiskv'?", "oracle_topk")),
        (("show", "louiskv", "--set", "token_budgt=3"), ("no option 'token_budgt'", "did you mean 'token_budget'?")),
        (("show", "louiskv", "--set", "token_budget"), ("expected key=value, got 'token_budget'",)),
        (("show", "louiskv", "--set", "token_budget=many"), ("token_budget", "must be int, got 'many'")),
        (("show", "louiskv", "--set", "token_budget=0"), ("must be an integer >= 1, got 0",)),
        (("show", "louiskv", "--set", "token_budget=3"), ("a budget of 3 tokens is smaller than one unit",)),
        (("demo", "--policy", "luiskv"), ("did you mean 'louiskv'?",)),
        (("demo", "--dtype", "int8"), ("--dtype must be one of auto, float32", "got 'int8'")),
        (("demo", "--execution", "onload"), ("--execution must be one of offload, dense, shadow", "got 'onload'")),
        (("generate", "m"), ("either --prompt or --prompt-file, got both or neither",)),
        (("generate", "m", "--prompt", "a", "--prompt-file", "b"), ("got both or neither",)),
        (("generate", "m", "--prompt", ""), ("the prompt is empty",)),
        (("generate", "m", "--prompt-file", "missing.txt"), ("cannot read the prompt missing.txt", "No such file")),
        (("generate", "./missing", "--prompt", "a"), ("./missing is no directory",)),
        (("generate", "a/b/c", "--prompt", "a"), ("a/b/c is no directory",)),
        (("generate", "m", "--prompt", "a", "--policy", "ful"), ("did you mean 'full'?",)),
        (("generate", "m", "--prompt", "a", "--execution", "x"), ("--execution must be one of offload",)),
        (("generate", "m", "--prompt", "a", "--calibration", "missing.json"), ("cannot read the calibration",)),
        (("calibrate", "m", "--rate", "1.5"), ("--rate must lie between 0 and 1, got 1.5",)),
        (("calibrate", "m", "--per", "head"), ("--per must be one of layer, model; got 'head'",)),
        (("calibrate", "m", "--rope", "during"), ("--rope must be one of after, before",)),
        (("calibrate", "m", "--dense-layers", "0;1"), ("--dense-layers must be layer numbers", "got '0;1'")),
        (("calibrate", "m", "--text-file", "missing.txt"), ("cannot read the text", "missing.txt")),
        (("calibrate", "m", "--output", "missing/tau.json"), ("there is no directory", "make it first")),
        (("families", "lama"), ("did you mean 'llama'?",)),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], words: tuple[str, ...], fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says what was expected, what came, and the way out."""
    monkeypatch.chdir(tmp_path)

    message = fails(*arguments)

    assert all(word in message for word in words), message


def test_directory_that_is_no_model(fails: Fails, tmp_path: Path) -> None:
    """A directory without a config, one with a broken one, and a file."""
    assert "is a directory without config.json" in fails("generate", tmp_path, "--prompt", "a")
    (tmp_path / "config.json").write_text("{}")
    assert "cannot load a causal language model from" in fails("generate", tmp_path, "--prompt", "a")
    assert "is no directory" in fails("calibrate", tmp_path / "config.json")


def test_name_that_no_hub_has(fails: Fails) -> None:
    """The tests are offline, so nothing is found."""
    assert "or the name of one on the hub" in fails("generate", "nobody/nothing", "--prompt", "a")


def test_text_that_is_no_text(fails: Fails, tmp_path: Path) -> None:
    """A file in another encoding."""
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")

    assert "cannot read the prompt" in fails("generate", "m", "--prompt-file", tmp_path / "bytes")
    assert "cannot read the text" in fails("calibrate", "m", "--text-file", tmp_path / "bytes")


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "cannot read the calibration"),
        ("[]", "holds a list"),
        ('{"tau": 1}', "rope is missing"),
        ('{"tau": 0.5, "rope": "after", "retrieval_rate": 0.1, "achieved": [], "num_samples": 1, "x": 0}', "'x'"),
    ],
)
def test_broken_calibration(content: str, words: str, fails: Fails, tmp_path: Path) -> None:
    """A file that `kvframe calibrate` did not write."""
    (tmp_path / "tau.json").write_text(content)

    assert words in fails("generate", "m", "--prompt", "a", "--calibration", tmp_path / "tau.json")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_where(place: int, run: Run) -> None:
    """With --debug, anywhere, the error itself comes through."""
    arguments = ["show", "luiskv"]
    arguments.insert(place, "--debug")

    with pytest.raises(UnknownNameError):
        run(*arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, run: Run) -> None:
    """Every command explains itself and its options."""
    assert "Usage:" in run(name, "--help").stdout
    assert f" {name} " in run("--help").stdout


def test_no_command_is_help(run: Run) -> None:
    """Without a command, the commands are listed; that is not success."""
    result = run(code=2)

    assert "calibrate" in result.output


def test_version(run: Run) -> None:
    """The version alone."""
    assert run("--version").stdout == f"kvframe {kvframe.__version__}\n"


def test_unknown_command(run: Run) -> None:
    """An unknown command or option is a usage error."""
    assert "No such command" in run("demonstrate", code=2).stderr
    assert "No such option" in run("list", "--jsn", code=2).stderr


def test_importing_the_command_line_is_cheap() -> None:
    """Help does not wait for transformers."""
    command = "import kvframe.cli, sys; sys.exit(any(name in sys.modules for name in ('transformers', 'triton')))"

    assert subprocess.run([sys.executable, "-P", "-c", command], timeout=60).returncode == 0


def test_installed_script() -> None:
    """The script that pip installs runs, with the exit codes and streams of a process."""
    script = Path(sys.executable).parent / "kvframe"
    done = subprocess.run([script, "show", "luiskv"], capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no policy named 'luiskv'; did you mean 'louiskv'?")
    assert "Traceback" in subprocess.run([script, "show", "luiskv", "--debug"], capture_output=True, text=True).stderr
