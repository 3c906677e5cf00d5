"""What is not retrieved is estimated instead of left out."""

from typing import ClassVar

from attrs import frozen

from kvframe.stages.around import SelectorAround
from kvframe.types import Invariant


@frozen(kw_only=True)
class EstimateRest(SelectorAround):
    """Another selector's selection; and every unit enters attention, with its tokens that are not attended, as one
    virtual entry: their number times exp(q . mean key), and the mean value.

    The estimate of RetroInfer (2025, arXiv 2505.02922), of all units instead of some. A unit of which some tokens are
    attended counts with the others. Needs a scorer that keeps mean keys and values.
    """

    name: ClassVar[str] = "estimate-rest"
    capturable: ClassVar[bool] = True
    estimates: ClassVar[bool] = True
    waives: ClassVar[frozenset[Invariant]] = frozenset({Invariant.ATTENDED_ONLY})

    @property
    def ranks(self) -> bool:
        return self.selector.ranks
