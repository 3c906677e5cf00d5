"""StreamingLLM: the first tokens and the last ones; what lies between is gone.

Efficient Streaming Language Models with Attention Sinks, 2023, arXiv 2309.17453.

- trigger: never; selector: nothing
- residency: 4 sinks and a window of 1020 tokens, in every layer
- units, scorer: not asked
- transfer: none, the rest is dropped

Where ours differs from the paper:

- **Positions are those of the text.** The paper counts positions inside its cache, so that a text may outgrow the
  positions a model was trained for. Here keys keep their rotary embedding, and the model's own limit stays.
- **A later turn of a chat** attends to what is left, as in the paper; the first one's prompt is attended in full, where
  the paper would evict while it reads.

`window` attends to the same, in the sizes of the other policies here, and keeps the rest on the host for later turns.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import Drop, MeanKey, Never, SelectNothing, TokenUnits


@frozen(kw_only=True)
class StreamingLLMConfig:
    """StreamingLLM: four attention sinks and a window; nothing comes back."""

    sink_size: int = 4
    window_size: int = 1020
    dense_layers: tuple[int, ...] | Literal["all"] = ()
    """Layers that keep their whole KV on the device."""


def build_streamingllm(config: StreamingLLMConfig) -> Policy:
    """The policy that a config stands for."""
    return Policy(
        name="streamingllm",
        trigger=Never(),
        units=TokenUnits(),
        scorer=MeanKey(),
        selector=SelectNothing(),
        transfer=Drop(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="streamingllm",
        config_cls=StreamingLLMConfig,
        build=build_streamingllm,
        title="Efficient Streaming Language Models with Attention Sinks",
        year=2023,
        paper="arXiv 2309.17453",
    ),
)
