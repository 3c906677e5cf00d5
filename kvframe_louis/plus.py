"""LouisKV and more: what is not retrieved is estimated, and tokens are ranked by a sketch of their keys."""

from typing import ClassVar, Literal

import attrs
from attrs import frozen

from kvframe.composition import Policy
from kvframe.stages import EstimateRest, MeanKey, MissedShare, SketchRerank
from kvframe_louis.policy import LouisKVConfig, build_louiskv


@frozen(kw_only=True)
class LouisKVPlusConfig(LouisKVConfig):
    """LouisKV, and beyond it: every unit that is not retrieved is estimated, tokens are ranked by 4-bit keys.

    Units and transfer are LouisKV's (arXiv 2510.11292), and its trigger cuts segments. Units are selected up to
    `oversample` times the budget, and of their tokens the best by a sketch of their keys; a head retrieves where a
    token that is not on the device would get more than `missed_share` of its attention, by its sketch. All others enter
    attention as one virtual entry a unit, the estimate of RetroInfer (arXiv 2505.02922). The device holds a mean key
    and a mean value for every `cluster_size` tokens, and `bits` for every number of a key: with the defaults and
    bfloat16 just under a fifth of the KV that they stand for.
    """

    policy_name: ClassVar[str] = "louiskv-plus"
    missed_share: float | None = 0.03
    """A head retrieves where a token on the host would get more than this share of its attention; None for LouisKV's
    trigger, whose options otherwise say only where segments are cut."""
    estimate: bool = True
    """Estimate what is not retrieved; False leaves it out."""
    oversample: int = 16
    """Candidates for a sketch are so many times the budget."""
    bits: int | None = 4
    """Of a number in the sketch of a key: 2, 4 or 8. None for no sketch: units are taken whole, and no token is missed
    that is known of, so that `missed_share` has to be None as well."""
    run_length: int = 1
    """Tokens next to each other in the store that are taken together; longer runs cross the link faster."""
    scales: Literal["token", "channel"] = "token"
    """Rounding of the sketch: one step a token, or the same after every channel was divided by its own size."""


def build_louiskv_plus(config: LouisKVPlusConfig) -> Policy:
    """LouisKV's units and transfer, with trigger, scorer and selector of its own."""
    base = build_louiskv(config)
    selector = base.selector
    if config.bits is not None:
        selector = SketchRerank(
            token_budget=config.token_budget,
            oversample=config.oversample,
            bits=config.bits,  # type: ignore[arg-type]  # the stage says what it takes
            run_length=config.run_length,
            scales=config.scales,
        )
    if config.estimate:
        selector = EstimateRest(selector=selector)
    scorer, trigger = base.scorer, base.trigger
    assert isinstance(scorer, MeanKey)
    if config.missed_share is not None:
        trigger = MissedShare(share=config.missed_share, events=trigger)
    return base.swap(trigger=trigger, scorer=attrs.evolve(scorer, keep_values=True), selector=selector)
