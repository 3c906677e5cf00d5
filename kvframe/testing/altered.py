"""Stages that are what they were, but for some methods."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from kvframe.stages import Stage

StageT = TypeVar("StageT", bound=Stage)
Around = Callable[..., Any]
"""Called as the method is, with the method itself in front."""


def altered(stage: StageT, **methods: Around) -> StageT:
    """A copy of a stage, of its class, with each of these methods replaced by a function around it.

    Whatever else the stage has, it keeps, so that one written for a later slot interface is altered as well as one of
    today. What a method of the stage calls on the stage itself is not altered.
    """

    def around(name: str, function: Around) -> Callable[..., Any]:
        original = getattr(stage, name)

        def method(self: Stage, *args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        return method

    cls = type(stage)
    own = {name: around(name, function) for name, function in methods.items()}
    described = {"__slots__": (), "__doc__": cls.__doc__, "__module__": cls.__module__}
    changed = copy.copy(stage)
    metaclass: Any = type(cls)
    object.__setattr__(changed, "__class__", metaclass(cls.__name__, (cls,), {**described, **own}))
    return changed
