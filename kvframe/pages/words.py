"""Traits in words."""

from kvframe.traits import Traits


def lost(traits: Traits) -> str:
    """What is gone of a token that is not attended."""
    if traits.loses == "tokens":
        return "tokens that are dropped"
    if traits.loses == "precision":
        return "digits of keys and values"
    if traits.retrieves or traits.is_dense:
        return "nothing"
    return "what has left the window, until a later turn"


def moved(traits: Traits) -> str:
    """What comes from the host while decoding."""
    if traits.moves == "all rows":
        return "rows that are missing; all rows where a step attends in full"
    return "rows of a selection that are missing" if traits.moves == "missing rows" else "nothing"


def calibration(traits: Traits) -> str:
    """What has to fit the model."""
    return ", ".join(f"`{option}`" for option in traits.calibrated) or "none"


def stage_of(traits: Traits, slot: str) -> str:
    """A stage's name, with those that it is made of."""
    name, *parts = (f"`{name}`" for name in traits.stages[slot])
    return f"{name} of {' and '.join(parts)}" if parts else name
