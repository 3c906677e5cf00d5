"""Decisions on tape: what one run decided, decided again by another."""

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

from kvframe.composition import Policy
from kvframe.testing.altered import altered
from kvframe.types import Decision


class Tape:
    """Records what stages decide, in the order in which the runtime asks, and answers with it when played back."""

    def __init__(self) -> None:
        self.decisions: deque[Any] = deque()
        self.playing = False

    def __call__(self, decide: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The recorded decision, or the one that is made now."""
        if self.playing:
            return self.decisions.popleft()
        # A trigger may hand out what it later changes in place.
        decision = copy.deepcopy(decide(*args, **kwargs))
        self.decisions.append(decision)
        return decision

    def _review(self, decide: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a trigger says on review, as a decision of its own."""
        made = self(lambda *args, **kwargs: Decision(due=decide(*args, **kwargs)), *args, **kwargs)
        return made.due

    def wrap(self, policy: Policy) -> Policy:
        """The policy with its deciding stages on this tape."""
        return policy.swap(
            trigger=altered(policy.trigger, step=self, review=self._review),
            units=altered(policy.units, build_block=self, boundary=self),
            selector=altered(policy.selector, select=self, choose=self),
        )
