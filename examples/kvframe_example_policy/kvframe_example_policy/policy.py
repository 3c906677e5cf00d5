"""The policy: pages, selected by both stages of this package."""

from attrs import frozen

import kvframe
from kvframe_example_policy.scorer import KeyDirection
from kvframe_example_policy.trigger import AdaptiveStride


@frozen(kw_only=True)
class SteadyPagesConfig:
    """Pages by the direction of their keys, selected less often while the query stays where it is."""

    token_budget: int = 1024
    page_size: int = 16
    """Tokens of a page."""
    tau: float = 0.8
    """Cosine from which on the query counts as where it was."""
    max_stride: int = 16
    """The most steps without a selection."""
    sink_size: int = 64
    window_size: int = 256


def build_steady_pages(config: SteadyPagesConfig) -> kvframe.Policy:
    """The policy that a config stands for."""
    return kvframe.Policy(
        name="steady-pages",
        trigger=AdaptiveStride(tau=config.tau, max_stride=config.max_stride),
        units=kvframe.PageUnits(page_size=config.page_size),
        scorer=KeyDirection(),
        selector=kvframe.TopBudget(token_budget=config.token_budget),
        transfer=kvframe.HostPool(),
        sink_size=config.sink_size,
        window_size=config.window_size,
    )
