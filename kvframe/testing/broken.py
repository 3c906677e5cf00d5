"""What a check raises where a promise is not kept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvframe.stages import Stage
from kvframe.testing.cases import Heads, Trace


class Broken(AssertionError):
    """A promise is not kept; the message says where, what was expected and what came.

    stage: the stage at fault, where the check knows it.
    """

    def __init__(self, message: str, stage: Stage | None = None) -> None:
        super().__init__(message)
        self.stage = stage


def require_equal_positions(expected: Sequence[Heads], actual: Sequence[Heads], who: str, other: str) -> None:
    """The same positions at every decode step, of every row and KV head."""
    if expected == actual:
        return
    for step, (wanted, found) in enumerate(zip(expected, actual)):
        for batch, rows in enumerate(wanted):
            for head, positions in enumerate(rows):
                if positions != found[batch][head]:
                    raise Broken(
                        f"decode step {step}, row {batch}, KV head {head}: {who} attends to {positions}, "
                        f"{other} to {found[batch][head]}"
                    )
    raise Broken(f"{who} took {len(expected)} decode steps, {other} {len(actual)}")


def require_close(
    expected: Sequence[Tensor], actual: Sequence[Tensor], tolerance: float, who: str, other: str, what: str
) -> None:
    """Tensors one by one, equal but for `tolerance`, absolute and relative; 0 for bit by bit."""
    for number, (one, two) in enumerate(zip(expected, actual, strict=True)):
        if one.shape != two.shape:
            raise Broken(f"{what} {number}: {who} gives the shape {tuple(one.shape)}, {other} {tuple(two.shape)}")
        if not torch.allclose(two, one, atol=tolerance, rtol=tolerance):
            difference = (one - two).abs().nan_to_num(torch.inf)
            place = ", ".join(str(int(index)) for index in torch.unravel_index(difference.argmax(), one.shape))
            raise Broken(
                f"{what} {number}: {who} and {other} differ by {float(difference.max()):.2g} at [{place}] "
                f"(allowed: {tolerance:.0e})"
            )


def require_equal_traces(expected: Trace, actual: Trace, tolerance: float, who: str, other: str) -> None:
    """The same positions at every step, and the same outputs but for rounding."""
    require_equal_positions(expected.attended, actual.attended, who, other)
    require_close(expected.prompts, actual.prompts, tolerance, who, other, "output of prompt call")
    require_close(expected.outputs, actual.outputs, tolerance, who, other, "output of decode step")
