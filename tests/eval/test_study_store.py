"""The results file: what is committed stays, and what cannot be used is left as it is."""

import multiprocessing
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from eval.studies import save_tiny_model, small_study

from kvframe.errors import ResultsFileError
from kvframe.eval.outcome import Outcome
from kvframe.eval.store import FORMAT, Store, read_outcomes
from kvframe.eval.study import Cell


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cell, ...]:
    """Cells of a small study; none is run."""
    return small_study(save_tiny_model(tmp_path_factory.mktemp("model"))).cells()


def ended(cell: Cell, **figures: float) -> Outcome:
    """A cell that has these figures."""
    return Outcome(key=cell.key, figures=figures, seconds=1.5, environment={"python": "3"})


def test_what_is_saved_can_be_read(cells: tuple[Cell, ...], tmp_path: Path) -> None:
    """Figures, errors and environments come back as they were, in this process and by readers."""
    path = tmp_path / "results.sqlite"
    good = ended(cells[0], kl=0.1 + 0.2, score=1.0)
    bad = Outcome(key=cells[1].key, error="Traceback\nValueError: no", seconds=0.5)
    with Store(path) as store:
        store.save(cells[0], good)
        store.save(cells[1], bad)

        assert read_outcomes(path) == store.outcomes() == {good.key: good, bad.key: bad}
        assert (store.done(), store.failed()) == ({good.key}, {bad.key})
    with Store(path) as store:
        assert store.outcomes() == {good.key: good, bad.key: bad}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.sqlite"]


def test_one_writer(cells: tuple[Cell, ...], tmp_path: Path) -> None:
    """A second study on the same file is refused, and the first goes on."""
    path = tmp_path / "results.sqlite"
    with Store(path) as store:
        with pytest.raises(ResultsFileError, match="another study is writing it"):
            Store(path)
        store.save(cells[0], ended(cells[0]))
    with Store(path) as store:
        assert store.done() == {cells[0].key}


def test_another_format_is_left_alone(cells: tuple[Cell, ...], tmp_path: Path) -> None:
    """Not a byte of it changes."""
    path = tmp_path / "results.sqlite"
    with Store(path) as store:
        store.save(cells[0], ended(cells[0]))
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version = {FORMAT + 1}")
    database.close()
    before = path.read_bytes()

    for use in (Store, read_outcomes):
        with pytest.raises(ResultsFileError, match=f"has format {FORMAT + 1}, this kvframe reads and writes"):
            use(path)
    assert path.read_bytes() == before


def test_what_is_no_results_file(tmp_path: Path) -> None:
    """Text, another program's database, and a directory that is not there."""
    text, foreign = tmp_path / "notes.txt", tmp_path / "foreign.sqlite"
    text.write_text("these are notes, and no database at all\n" * 50)
    database = sqlite3.connect(foreign)
    database.execute("CREATE TABLE mine (x)")
    database.close()
    before = foreign.read_bytes()

    with pytest.raises(ResultsFileError, match="is no results file"):
        Store(text)
    with pytest.raises(ResultsFileError, match="database of another program"):
        Store(foreign)
    with pytest.raises(ResultsFileError, match="there is no directory"):
        Store(tmp_path / "nowhere" / "results.sqlite")
    with pytest.raises(ResultsFileError, match="there is no such file"):
        read_outcomes(tmp_path / "results.sqlite")
    assert foreign.read_bytes() == before and text.read_text().startswith("these are notes")


def test_a_locked_database(cells: tuple[Cell, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program that holds the database is an error that says so; what was saved stays."""
    monkeypatch.setattr("kvframe.eval.store._LOCK_SECONDS", 0.05)
    path = tmp_path / "results.sqlite"
    with Store(path) as store:
        store.save(cells[0], ended(cells[0]))
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ResultsFileError, match="another program holds the database .*nothing that was saved is"):
            store.save(cells[1], ended(cells[1]))
        other.execute("ROLLBACK")
        other.close()
        store.save(cells[2], ended(cells[2]))

        assert store.done() == {cells[0].key, cells[2].key}


_FILLS_A_DISK = """
import pickle, resource, signal, sys
from kvframe.errors import ResultsFileError
from kvframe.eval.outcome import Outcome
from kvframe.eval.store import Store
cells = pickle.load(open(sys.argv[2], "rb"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Store(sys.argv[1]) as store:
    # No file may grow beyond this: to SQLite, a disk that is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    for number, cell in enumerate(cells):
        try:
            store.save(cell, Outcome(key=cell.key, figures={"text": "x" * 50_000}, seconds=0.0))
        except ResultsFileError as error:
            print(number, error)
            break
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_a_full_disk(cells: tuple[Cell, ...], tmp_path: Path) -> None:
    """The error says what to do, and every cell that was committed before is there."""
    import pickle

    path, pickled = tmp_path / "results.sqlite", tmp_path / "cells"
    pickled.write_bytes(pickle.dumps(cells))
    done = subprocess.run(
        [sys.executable, "-c", _FILLS_A_DISK, path, pickled], capture_output=True, text=True, check=True, timeout=120
    )
    number, _, message = done.stdout.partition(" ")

    assert int(number) > 0 and "free some space on its disk" in message
    assert set(read_outcomes(path)) == {cell.key for cell in cells[: int(number)]}


def _write_for_ever(path: Path, cells: tuple[Cell, ...], ready: "multiprocessing.Queue[int]") -> None:
    store = Store(path)
    for number, cell in enumerate(cells):
        store.save(cell, Outcome(key=cell.key, figures={"number": number}, seconds=0.0))
        ready.put(number)
    signal.pause()


def test_a_killed_writer_leaves_no_lock(cells: tuple[Cell, ...], tmp_path: Path) -> None:
    """What it had committed is there, and the next one can write."""
    path = tmp_path / "results.sqlite"
    context = multiprocessing.get_context("fork")
    ready: multiprocessing.Queue[int] = context.Queue()
    writer = context.Process(target=_write_for_ever, args=(path, cells, ready))
    writer.start()
    committed = [ready.get(timeout=60) for _ in cells[:3]]
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join()

    with Store(path) as store:
        assert len(store.done()) >= len(committed)
        assert all(store.outcomes()[cells[number].key].figures == {"number": number} for number in committed)


def test_limits_are_those_of_this_process() -> None:
    """The full disk was the subprocess's alone."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
