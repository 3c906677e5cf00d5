"""SentenceKV: sentences of the prompt, found by the sentence being written.

SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching, 2025, arXiv 2504.00970.

- trigger: when a sentence has been written
- units: sentences
- scorer: product of the mean query of that sentence with a sentence's mean key
- selector: the highest sentences up to the budget, the last one cut to fit
- transfer: all KV on the host
- residency: 32 sinks, 32 recent tokens

The tokens that end a sentence depend on the tokenizer: `policy.fitted(tokenizer)` finds them, as the commands do.

Where ours differs from the paper:

- **Nothing is pruned.** The paper first drops all but 3 times the budget of the prompt's tokens, as SnapKV does, and
  keeps sentences of what is left. Here a sentence keeps all its tokens.
- **Generated sentences** can be retrieved as well; there only the prompt's are.
- **Long sentences** are cut at 64 tokens, and what of the prompt lies in the window when generating begins is cut into
  runs of that length.
- **A sentence ends** with a mark such as a full stop, or with a new line, whatever comes next; so an abbreviation ends
  one.
- **One selection for each KV head**: the mean of its query heads' scores.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import HostPool, TopBudget
from kvframe_baselines.stages import SentenceMeanKey, SentenceTrigger, SentenceUnits


@frozen(kw_only=True)
class SentenceKVConfig:
    """SentenceKV: sentences, found by the mean query of the sentence being written."""

    token_budget: int = 1024
    sink_size: int = 32
    window_size: int = 32
    max_sentence: int = 64
    """A sentence of this many tokens is closed without an end."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end a sentence; empty for those of the tokenizer that the policy is fitted to."""
    dense_layers: tuple[int, ...] | Literal["all"] = ()
    """Layers that keep their whole KV on the device."""


def build_sentencekv(config: SentenceKVConfig) -> Policy:
    """The policy that a config stands for."""
    return Policy(
        name="sentencekv",
        trigger=SentenceTrigger(end_ids=config.end_ids),
        units=SentenceUnits(end_ids=config.end_ids, max_sentence=config.max_sentence),
        scorer=SentenceMeanKey(end_ids=config.end_ids, softmax=False),
        selector=TopBudget(token_budget=config.token_budget),
        transfer=HostPool(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="sentencekv",
        config_cls=SentenceKVConfig,
        build=build_sentencekv,
        title="SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching",
        year=2025,
        paper="arXiv 2504.00970",
    ),
)
