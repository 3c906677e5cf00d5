"""What became of one family in the sweep."""

from enum import StrEnum

from attrs import frozen


class Status(StrEnum):
    """The five ends of a comparison, from what is hoped for to what must never be."""

    EQUAL = "equal"
    REFUSED = "refused"
    NOT_BUILDABLE = "not buildable"
    ERROR = "error"
    DIFFERENT = "different"


@frozen(kw_only=True)
class Outcome:
    """One model type's end, and the measurements behind it."""

    model_type: str
    status: Status
    reason: str = ""
    model_class: str = ""
    retrieval_layers: int = 0
    layers: int = 0
    selections: int = 0
    rows_recalled: int = 0
    full_error: float | None = None
    """Largest logit difference, full budget against plain, as a share of the largest plain logit."""
    tight_error: float | None = None
    """The same, `offload` against `dense` under the tight budget."""
    tight_effect: float | None = None
    """The same, tight budget against plain: how much the budget matters at all."""
    seconds: float = 0.0
