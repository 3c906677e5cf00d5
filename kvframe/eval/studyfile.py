"""A study as a Python file: found, run, and the same module in every process that works on it."""

import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Self

from attrs import frozen

from kvframe.errors import StudyFileError
from kvframe.eval.study import Study

MODULE = "kvframe_study"
"""What the file's module is called in every process, so that a stage defined in it can travel between them."""


@frozen
class StudyFile:
    """A study file: where it lies, and its text, which goes to workers that cannot see it."""

    path: str
    text: str

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The file at `path`. Raises StudyFileError where there is none."""
        try:
            return cls(str(path), Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise StudyFileError(f"cannot read the study {path}: {error}") from error

    def load(self) -> ModuleType:
        """The file's module, run once in a process.

        Raises StudyFileError, with the traceback, for whatever the file raises.
        """
        loaded = sys.modules.get(MODULE)
        if loaded is not None and getattr(loaded, "__study_text__", None) == self.text:
            return loaded
        folder = str(Path(self.path).absolute().parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)  # as for a script: what lies beside it can be imported
        module = ModuleType(MODULE)
        module.__file__ = self.path
        module.__dict__["__study_text__"] = self.text
        sys.modules[MODULE] = module
        try:
            exec(compile(self.text, self.path, "exec", dont_inherit=True), vars(module))
        except BaseException as error:
            del sys.modules[MODULE]
            if isinstance(error, KeyboardInterrupt):
                raise
            raise StudyFileError(f"the study {self.path} raises an error:\n{_traceback(error)}") from error
        return module

    def study(self) -> Study:
        """What the file calls `study`. Raises StudyFileError where there is none."""
        module = self.load()
        found = getattr(module, "study", None)
        if not isinstance(found, Study):
            others = [name for name, value in vars(module).items() if isinstance(value, Study)]
            way_out = f"; rename {others[0]!r}" if others else ""
            what = "defines no `study`" if found is None else f"has a `study` of type {type(found).__name__}"
            raise StudyFileError(
                f"{self.path} {what}; expected `study = kvframe.eval.Study(...)` in its outermost block{way_out}"
            )
        return found


def _traceback(error: BaseException) -> str:
    """The error with its frames from the study file on."""
    frames = error.__traceback__
    if frames is not None and frames.tb_next is not None:
        frames = frames.tb_next  # the call of exec is of no interest
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()
