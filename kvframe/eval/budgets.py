"""The budget of a selector, of its own or of the selector that it asks."""

from typing import Any, TypeVar

import attrs

from kvframe.stages import Stage

_S = TypeVar("_S", bound=Stage)


def token_budget(selector: Stage) -> int | None:
    """Tokens that a selector may take; None where neither it nor a stage inside it has such a setting."""
    budgets = (getattr(part, "token_budget", None) for part in selector.with_parts())
    return next((budget for budget in budgets if budget is not None), None)


def with_token_budget(selector: _S, budget: int) -> _S:
    """The same selector with another budget, wherever `token_budget` found it.

    Raises ConfigError for a budget that it cannot have.
    """
    evolve: Any = attrs.evolve
    if hasattr(selector, "token_budget"):
        changed: _S = evolve(selector, token_budget=budget)
        return changed
    inner = {
        attribute.name: with_token_budget(part, budget)
        for attribute in attrs.fields(type(selector))  # type: ignore[arg-type]
        if isinstance(part := getattr(selector, attribute.name), Stage)
    }
    made: _S = evolve(selector, **inner)
    return made
