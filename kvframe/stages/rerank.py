"""Selection in two passes: units first, then their tokens, ranked by keys in a few bits."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from attrs import field, frozen
from torch import Tensor

from kvframe.stages.selector import Selector
from kvframe.types import Candidates, LeavingUnits, StepInputs, UnitTable
from kvframe.validators import integer, one_of


@frozen(kw_only=True)
class SketchRerank(Selector):
    """The best units up to a multiple of the budget, and of their tokens the best by a sketch of their keys.

    The sketch of a key is its difference to the mean key of its unit in a few bits, kept on the device; what a token's
    score misses is then a small part of a small number. Scores of tokens are made one per KV head as those of units:
    softmax over the candidates for every query head, then the mean over the heads of a group. Where a trigger reviews,
    the softmax is over sinks and window as well, so that a score is a share of all attention.
    """

    name: ClassVar[str] = "sketch-rerank"
    capturable: ClassVar[bool] = True
    token_budget: int = field(default=1024, validator=integer(at_least=1))
    """Tokens that every head retrieves, where there are as many."""
    oversample: int = field(default=4, validator=integer(at_least=1))
    """The candidates are so many times the budget."""
    bits: Literal[2, 4, 8] = field(default=4, validator=one_of(2, 4, 8))
    """Of a number in the sketch."""
    run_length: int = field(default=1, validator=integer(at_least=1))
    """Candidates that lie next to each other in the store and are taken together: longer runs cross the link faster."""
    scales: Literal["token", "channel"] = field(default="token", validator=one_of("token", "channel"))
    """One step for the numbers of each token; or, "channel", the same after every channel was divided by its own size
    in the head's first rows, so that the few large channels that keys have do not set every step."""

    @property
    def capacity(self) -> int:
        return self.token_budget

    @property
    def num_candidates(self) -> int:
        """Tokens that are ranked for every head, where there are as many."""
        return self.oversample * self.token_budget

    @property
    def needs_means(self) -> bool:
        return True

    @property
    def ranks(self) -> bool:
        return True

    @property
    def scales_channels(self) -> bool:
        return self.scales == "channel"

    def row_index(
        self, keys: Tensor, values: Tensor, centres: Tensor, channels: Tensor | None = None
    ) -> dict[str, Tensor]:
        from kvframe_kernels.key_sketch import encode_sketch

        return encode_sketch(keys, self.bits, centres, channels).named()

    def extend(self, row_index: Mapping[str, Tensor], unit: LeavingUnits, channels: Tensor | None = None) -> None:
        from kvframe_kernels.key_sketch import Sketch, window_sketch

        window_sketch(
            Sketch.of(row_index), self.bits, unit.leaves, unit.start, unit.size, unit.keys,
            unit.ring_first, unit.ring_size, centred=True, channels=channels,
        )  # fmt: skip

    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> tuple[Tensor, Tensor]:
        return self.choose(inputs, self.candidates(inputs, scores, units), scores, units)

    def candidates(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> Candidates:
        from kvframe_kernels.key_sketch import Centres, Sketch, sketch_scores
        from kvframe_kernels.select_units import select_candidates

        assert units.means is not None, "asked for by needs_means"
        # In the order of the store, so that runs are runs and ties go to the lower row.
        rows, count, unit_ids = select_candidates(scores, units.offsets, self.num_candidates, due=inputs.due)
        shares = sketch_scores(
            inputs.query, rows, count, Sketch.of(units.row_index), self.bits, inputs.layout.sm_scale,
            channels=units.channels, centres=Centres(units.means[0], unit_ids),
            kept_lse=inputs.kept_lse, due=inputs.due,
        )  # fmt: skip
        return Candidates(rows, count, shares)

    def choose(
        self, inputs: StepInputs, candidates: Candidates, scores: Tensor, units: UnitTable
    ) -> tuple[Tensor, Tensor]:
        from kvframe_kernels.select_units import select_runs

        rows, count, shares = candidates.rows, candidates.count, candidates.shares
        return select_runs(shares, rows, count, self.run_length, self.token_budget, due=inputs.due)
