"""OmniKV: a few layers look at everything, and what they find serves the layers behind them.

OmniKV: Dynamic Context Selection for Efficient Long-Context LLMs, 2025, ICLR 2025.

- trigger: every step
- units: single tokens
- scorer: in a filter layer, the largest product of a token's key with any query head; that score serves all heads of
  all layers up to the next filter
- selector: the tokens with the highest scores
- transfer: all KV on the host
- dense layers: those before the first filter, and the filters, layers 2, 8 and 18 of 32

Where ours differs from the paper:

- **The budget** is a number of tokens. The paper gives it as a share of the prompt, down to 6.7 %.
- **Generated tokens** can be selected like those of the prompt once they have left the window. In the paper they all
  stay, and only the prompt is chosen from.
- **Which layers filter** is found for each model there. The defaults are those for Llama-3-8B; a model of fewer than 19
  layers needs others (`filter_layers`).
- **KV is not fetched ahead** of the layers that need it, though it is known as soon as a filter has run.
"""

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import EveryStep, HostPool, TokenUnits, TopBudget
from kvframe_baselines.stages import SharedTokens


@frozen(kw_only=True)
class OmniKVConfig:
    """OmniKV: tokens chosen in a few filter layers serve the layers behind them."""

    token_budget: int = 1024
    sink_size: int = 4
    window_size: int = 128
    filter_layers: tuple[int, ...] = (2, 8, 18)
    """Layers that attend in full and choose for those behind them; the ones before the first are dense as well."""
    softmax: bool = False
    """Normalise each query head over all tokens before the largest is taken."""


def build_omnikv(config: OmniKVConfig) -> Policy:
    """The policy that a config stands for."""
    scorer = SharedTokens(filter_layers=config.filter_layers, softmax=config.softmax)
    return Policy(
        name="omnikv",
        trigger=EveryStep(),
        units=TokenUnits(),
        scorer=scorer,
        selector=TopBudget(token_budget=config.token_budget),
        transfer=HostPool(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=tuple(sorted({*range(scorer.filter_layers[0]), *scorer.filter_layers})),
    )


POLICIES = (
    PolicySpec(
        name="omnikv",
        config_cls=OmniKVConfig,
        build=build_omnikv,
        title="OmniKV: Dynamic Context Selection for Efficient Long-Context LLMs",
        year=2025,
        paper="ICLR 2025",
    ),
)
