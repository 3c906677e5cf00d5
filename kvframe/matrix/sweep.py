"""All swaps, tried one after the other."""

from collections.abc import Iterator

from kvframe.matrix.outcome import Outcome
from kvframe.matrix.swaps import Swaps
from kvframe.matrix.trial import try_swap
from kvframe.registry import Registry


def outcomes(of: Swaps, registry: Registry) -> Iterator[Outcome]:
    """An outcome a swap, in the order of the swaps."""
    for swap in of:
        yield try_swap(swap, registry)
