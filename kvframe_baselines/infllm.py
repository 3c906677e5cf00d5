"""InfLLM: blocks of the far context, found by the keys that their own neighbourhood attended to.

InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory, 2024, arXiv 2402.04617.

- trigger: every step
- units: blocks of 128 consecutive tokens
- scorer: the 4 tokens of a block that the tokens behind them attend to most stand for it; a block's score is the sum of
  the products of the query with their keys, over all heads of a layer
- selector: the 16 highest blocks, 2048 tokens
- transfer: all KV on the host
- residency: 128 first tokens, 4096 recent ones

Where ours differs from the paper:

- **Decoding alone.** There a prompt too is read block by block, each attending to what it retrieves. Here a prompt
  attends in full, and so the model's own limit of positions stays.
- **Positions are those of the text.** The paper gives all far tokens one position, so that a text may outgrow what a
  model was trained for, and compares queries and keys as if at one distance.
- **Weights of tokens** are shares of attention, as in the code of its authors; the formula of the paper takes the
  products before the softmax. They are meaned over the query heads of a group, so that representative tokens are those
  of a KV head; there every query head has its own.
- **A generated token** is weighed by the attention of the steps while it lies in the window, which takes a second pass
  over what is attended.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import EveryStep, HostPool, PageUnits, TopBudget
from kvframe_baselines.stages import RepresentativeKeys


@frozen(kw_only=True)
class InfLLMConfig:
    """InfLLM, decode side: blocks, found by their locally most attended keys at every step."""

    token_budget: int = 2048
    sink_size: int = 128
    window_size: int = 4096
    page_size: int = 128
    """Tokens of a block."""
    num_keys: int = 4
    """Tokens of a block that stand for it."""
    local_size: int = 4096
    """How many tokens a prompt's token is weighed by: itself and those behind it."""
    heads: Literal["layer", "kv-head"] = "layer"
    """The same blocks for all heads of a layer, or blocks of its own for every KV head."""
    dense_layers: tuple[int, ...] | Literal["all"] = ()
    """Layers that keep their whole KV on the device."""


def build_infllm(config: InfLLMConfig) -> Policy:
    """The policy that a config stands for."""
    return Policy(
        name="infllm",
        trigger=EveryStep(),
        units=PageUnits(page_size=config.page_size),
        scorer=RepresentativeKeys(num_keys=config.num_keys, local_size=config.local_size, heads=config.heads),
        selector=TopBudget(token_budget=config.token_budget),
        transfer=HostPool(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="infllm",
        config_cls=InfLLMConfig,
        build=build_infllm,
        title="InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory",
        year=2024,
        paper="arXiv 2402.04617",
    ),
)
