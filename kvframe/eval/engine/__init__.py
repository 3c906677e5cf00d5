"""Where the cells of a study run: in this process, in processes of this machine, or on a Ray cluster."""

from kvframe.errors import UnknownNameError
from kvframe.eval.engine.base import Engine
from kvframe.eval.studyfile import StudyFile
from kvframe.suggest import hint

__all__ = ["ENGINES", "Engine", "make_engine"]

ENGINES = ("local", "inline", "ray")


def make_engine(name: str, workers: int | None = None, study_file: StudyFile | None = None) -> Engine:
    """The engine of this name.

    workers: cells at the same time; the engine's own choice without.
    study_file: what workers have to run before they can read a cell, if the study comes from a file.

    Raises UnknownNameError for an engine there is none of, ConfigError for one that cannot be used here.
    """
    if name not in ENGINES:
        raise UnknownNameError(f"no engine named {name!r}{hint(name, ENGINES)}")
    if name == "inline":
        from kvframe.eval.engine.inline import InlineEngine

        return InlineEngine()
    if name == "ray":
        from kvframe.eval.engine.ray import RayEngine

        return RayEngine(workers, study_file)
    from kvframe.eval.engine.local import LocalEngine

    return LocalEngine(workers, study_file)
