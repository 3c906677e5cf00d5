"""The results file of a study: SQLite, written by one driver, a committed transaction a cell."""

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from kvframe.errors import ResultsFileError
from kvframe.eval.outcome import Outcome
from kvframe.eval.study import Cell

FORMAT = 1
"""Counts up with every change of the tables."""
APPLICATION_ID = 0x6B766672
"""`kvfr`: what SQLite's header says of a results file, so that another program's database is not taken for one."""

_TABLES = """
CREATE TABLE cells (
    key TEXT PRIMARY KEY,
    config TEXT NOT NULL,
    figures TEXT,
    error TEXT,
    seconds REAL NOT NULL,
    environment TEXT NOT NULL,
    finished_at TEXT NOT NULL,
    times_run INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""
_LOCK_SECONDS = 5.0
_CANNOT_OPEN = "cannot be opened for writing ({}); give --results a place that can"


class Store:
    """A results file, open for writing; only one process may hold it.

    What was committed stays, whatever happens afterwards. Raises ResultsFileError for a file that is no results file,
    is of another format, is in use, or cannot be written; such a file is left as it is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.absolute().parent.is_dir():
            raise ResultsFileError(f"{self.path}: there is no directory {self.path.absolute().parent}; make it first")
        self._lock = _lock(self.path)
        try:
            if not self.path.exists() or self.path.stat().st_size == 0:
                self._create()
            check_format(self.path)
            self._database = self._open()
        except BaseException:
            self._unlock()
            raise

    def _create(self) -> None:
        """Put an empty results file in place, whole or not at all: a start that is broken off leaves none."""
        built = self.path.with_name(self.path.name + ".new")
        with self._explained():
            built.unlink(missing_ok=True)
            database = sqlite3.connect(built, isolation_level=None)
            try:
                database.executescript(
                    f"BEGIN; {_TABLES} PRAGMA user_version = {FORMAT}; PRAGMA application_id = {APPLICATION_ID};"
                    " COMMIT; PRAGMA journal_mode = WAL;"
                )
            finally:
                database.close()
            built.replace(self.path)

    def _open(self) -> sqlite3.Connection:
        with self._explained():
            database = sqlite3.connect(self.path, timeout=_LOCK_SECONDS, isolation_level=None)
            try:
                database.execute("PRAGMA synchronous = FULL")  # a cell that was reported done survives a power cut
            except BaseException:
                database.close()
                raise
            return database

    # ---- reading and writing ----------------------------------------------------------------------------------------

    def done(self) -> frozenset[str]:
        """Keys of the cells that have figures."""
        with self._explained():
            return frozenset(key for (key,) in self._database.execute("SELECT key FROM cells WHERE error IS NULL"))

    def failed(self) -> frozenset[str]:
        """Keys of the cells that were run and have none."""
        with self._explained():
            return frozenset(key for (key,) in self._database.execute("SELECT key FROM cells WHERE error IS NOT NULL"))

    def save(self, cell: Cell, outcome: Outcome) -> None:
        """Commit what became of a cell; of one that failed before, the new end takes the place of the old.

        Raises ResultsFileError where that cannot be written.
        """
        row = (
            cell.key,
            json.dumps(cell.to_dict()),
            None if outcome.figures is None else json.dumps(outcome.figures),
            outcome.error,
            outcome.seconds,
            json.dumps(outcome.environment),
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        with self._explained():
            self._database.execute(
                "INSERT INTO cells VALUES (?, ?, ?, ?, ?, ?, ?, 1) ON CONFLICT (key) DO UPDATE SET "
                "config = excluded.config, figures = excluded.figures, error = excluded.error, "
                "seconds = excluded.seconds, environment = excluded.environment, finished_at = excluded.finished_at, "
                "times_run = times_run + 1",
                row,
            )

    def outcomes(self) -> dict[str, Outcome]:
        """What became of every cell there is, by key."""
        with self._explained():
            return dict(_read(self._database))

    def close(self) -> None:
        """Let go of the file."""
        try:
            with self._explained():
                self._database.close()
        finally:
            self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors as ours, with the way out."""
        try:
            yield
        except sqlite3.Error as error:
            raise ResultsFileError(f"{self.path}: {_explain(error)}") from error
        except OSError as error:
            raise ResultsFileError(f"{self.path}: {_CANNOT_OPEN.format(error)}") from error

    def _unlock(self) -> None:
        # Removed while it is still held, so that nobody else holds it.
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()


def read_outcomes(path: str | Path) -> dict[str, Outcome]:
    """What became of every cell in a results file, by key, also while a study writes it.

    Raises ResultsFileError for a file that is none.
    """
    check_format(path)
    try:
        database = _connect_read_only(Path(path))
        try:
            return dict(_read(database))
        finally:
            database.close()
    except sqlite3.Error as error:
        raise ResultsFileError(f"{path}: {_explain(error)}") from error


def check_format(path: str | Path) -> None:
    """Raise ResultsFileError unless this is a results file of the present format; changes nothing."""
    if not Path(path).is_file():
        raise ResultsFileError(f"{path}: there is no such file; `kvframe ablate STUDY --results FILE` makes one")
    try:
        database = _connect_read_only(Path(path))
        try:
            (application_id,) = database.execute("PRAGMA application_id").fetchone()
            (found,) = database.execute("PRAGMA user_version").fetchone()
        finally:
            database.close()
    except sqlite3.OperationalError as error:
        raise ResultsFileError(f"{path}: {_explain(error)}") from error
    except sqlite3.DatabaseError as error:
        raise ResultsFileError(f"{path} is no results file ({error}); give --results another name") from error
    if application_id != APPLICATION_ID:
        raise ResultsFileError(f"{path} is a database of another program, no results file; give --results another name")
    if found != FORMAT:
        raise ResultsFileError(
            f"{path} has format {found}, this kvframe reads and writes format {FORMAT}; use the kvframe that made it, "
            "or give --results another name. The file was left as it is"
        )


def _connect_read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_LOCK_SECONDS)


def _read(database: sqlite3.Connection) -> Iterator[tuple[str, Outcome]]:
    rows = database.execute("SELECT key, figures, error, seconds, environment FROM cells")
    for key, figures, error, seconds, environment in rows:
        yield (
            key,
            Outcome(
                key=key,
                figures=None if figures is None else json.loads(figures),
                error=error,
                seconds=seconds,
                environment=json.loads(environment),
            ),
        )


def _explain(error: sqlite3.Error) -> str:
    """What SQLite says, and what to do about it."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"another program holds the database ({error}); close it and start again, nothing that was saved is lost"
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return (
            f"cannot be written ({error}); free some space on its disk and start again, what was saved before is there"
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return _CANNOT_OPEN.format(error)
    return f"{error}"


def _lock(path: Path) -> IO[Any]:
    """An exclusive lock that the system takes back when this process ends, however it ends."""
    name = path.with_name(path.name + ".lock")
    while True:
        try:
            file = open(name, "w")  # noqa: SIM115  # held for as long as the store is
        except OSError as error:
            raise ResultsFileError(
                f"{path}: cannot be opened for writing ({error}); give --results a place that can"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise ResultsFileError(
                f"{path} is in use: another study is writing it; wait for its end, or give --results another name"
            ) from error
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
                return file
        except FileNotFoundError:
            pass
        file.close()  # its last holder has removed it meanwhile
