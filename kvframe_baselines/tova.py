"""TOVA: at every step, the token that the current query attends to least goes.

Transformers are Multi-State RNNs, 2024, arXiv 2401.06104.

- trigger: every step
- units: single tokens
- scorer: attention weights of the last query, the mean over all heads of the layer
- selector: the highest tokens, up to the budget
- transfer: none, what is not kept is dropped

Nothing is kept for its place: no sinks, and of recent tokens only the current one. All heads of a layer keep the same
tokens. Of a prompt that is longer than the budget those stay that its last token attends to most, as in the code of its
authors.

Where ours differs from the paper: nothing but the order of work. The paper drops a token when a step has attended, here
it goes when the next one begins; the same tokens are attended.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import Drop, EveryStep, TokenUnits, TopBudget
from kvframe_baselines.stages import LastAttention


@frozen(kw_only=True)
class TOVAConfig:
    """TOVA: at every step, the token that the current query attends to least goes."""

    token_budget: int = 1024
    """Tokens that a layer keeps from one step to the next."""
    sink_size: int = 0
    window_size: int = 1
    heads: Literal["layer", "kv-head"] = "layer"
    """All heads of a layer keep the same tokens, or every KV head its own."""
    dense_layers: tuple[int, ...] | Literal["all"] = ()
    """Layers that keep their whole KV on the device."""


def build_tova(config: TOVAConfig) -> Policy:
    """The policy that a config stands for."""
    return Policy(
        name="tova",
        trigger=EveryStep(),
        units=TokenUnits(),
        scorer=LastAttention(heads=config.heads),
        selector=TopBudget(token_budget=config.token_budget),
        transfer=Drop(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="tova",
        config_cls=TOVAConfig,
        build=build_tova,
        title="Transformers are Multi-State RNNs",
        year=2024,
        paper="arXiv 2401.06104",
    ),
)
