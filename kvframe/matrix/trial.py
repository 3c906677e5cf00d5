"""One composition on random keys and queries: `dense` and `offload` have to do the same."""

from collections.abc import Iterator

import torch
from attrs import evolve, frozen
from torch import Tensor

from kvframe.composition import Policy
from kvframe.errors import ConfigError, KvframeError
from kvframe.matrix.outcome import Outcome, Verdict
from kvframe.matrix.swaps import Swap
from kvframe.memory.token_ids import TokenIds
from kvframe.registry import Registry
from kvframe.runtime import RetrievalLayer
from kvframe.testing.cases import LayerBehind
from kvframe.testing.small import with_dense_layers
from kvframe.types import Execution, LayerLayout, ModelLayout

TOLERANCE = 1e-9
"""Largest accepted difference of an output, in float64; what is attended to has to be the same exactly."""

PADDING = (0, 37)
TURNS = ((300, 10), (20, 5))
"""Tokens of a turn's text, and the tokens generated after it."""


@frozen(kw_only=True, eq=False)
class _Text:
    query: Tensor  # [B, Hq, T, D]
    keys: Tensor  # [B, H, T, D]
    values: Tensor  # [B, H, T, D]

    def span(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.query[:, :, start:stop], self.keys[:, :, start:stop], self.values[:, :, start:stop]


@frozen(kw_only=True)
class _Step:
    attended: list[list[int]]
    out: Tensor


def try_swap(swap: Swap, registry: Registry) -> Outcome:
    """Compose, check and run; whatever happens becomes an outcome."""
    outcome = Outcome(swap=swap, verdict=Verdict.RUNS)
    try:
        policy = swap.policy.swap(**{swap.slot: swap.stage})
        dense, offload = (_layer(policy, execution, registry) for execution in ("dense", "offload"))
    except KvframeError as error:
        return evolve(outcome, verdict=Verdict.REFUSED, reason=" ".join(str(error).split()))
    text = _text(offload.layout)
    try:
        pairs = zip(_steps(dense, text), _steps(offload, text), strict=True)
        problem = next((problem for expected, found in pairs if (problem := _difference(expected, found))), "")
    except Exception as error:
        return evolve(outcome, verdict=Verdict.ERROR, reason=f"{type(error).__name__}: {error}")
    return evolve(
        outcome,
        verdict=Verdict.DIFFERENT if problem else Verdict.RUNS,
        reason=problem,
        selections=int(offload.stats.selections.sum()),
        rows_recalled=int(offload.stats.rows_recalled.sum()),
    )


def _layer(policy: Policy, execution: Execution, registry: Registry) -> RetrievalLayer:
    """The second of two layers: the first is dense where the scorer goes by it."""
    policy = with_dense_layers(policy, ())
    layout = LayerLayout(
        layer_idx=1, num_layers=2, batch_size=len(PADDING), num_qo_heads=4, num_kv_heads=2, head_dim=16, value_dim=16,
        dtype=torch.float64, device=torch.device("cpu"), sm_scale=0.25,
    )  # fmt: skip
    model = ModelLayout(num_layers=2, retrieval_layers=(0, 1), device=layout.device, dtype=layout.dtype)
    if problems := registry.plugins.check_policy(policy, model):
        raise ConfigError("; ".join(problems))
    num_tokens = sum(map(sum, TURNS))
    return LayerBehind(layout, policy, num_tokens, execution, token_ids=_token_ids(num_tokens))


def _token_ids(num_tokens: int) -> TokenIds:
    """Ids that end a sentence now and then."""
    ids = torch.randint(0, 16, (1, num_tokens), generator=torch.Generator().manual_seed(0)).expand(len(PADDING), -1)
    tokens = TokenIds(len(PADDING), ids.device)
    tokens.enter(ids, [0] * len(PADDING), [num_tokens] * len(PADDING))
    return tokens


def _text(layout: LayerLayout) -> _Text:
    """Random keys and values; queries that stay about the same for a few tokens, as those of a text do."""
    generator = torch.Generator().manual_seed(0)
    batch_size, num_tokens = layout.batch_size, sum(map(sum, TURNS))

    def randn(num_heads: int) -> Tensor:
        shape = (batch_size, num_heads, num_tokens, layout.head_dim)
        return torch.randn(shape, generator=generator, dtype=layout.dtype)

    topic = (torch.rand(batch_size, num_tokens, generator=generator) < 0.2).cumsum(1)[:, None, :, None]
    base = 2 * randn(layout.num_qo_heads)
    query = base.gather(2, topic.expand_as(base)) + 0.4 * randn(layout.num_qo_heads)
    return _Text(query=query, keys=randn(layout.num_kv_heads), values=randn(layout.num_kv_heads))


def _steps(layer: RetrievalLayer, text: _Text) -> Iterator[_Step]:
    """Every decode step of all turns."""
    column = 0
    for num_read, num_generated in TURNS:
        num_real = [min(num_read, column + num_read - padding) for padding in PADDING]
        layer.prompt(*text.span(column, column + num_read), num_real, num_read)
        column += num_read
        for _ in range(num_generated):
            out = layer.decode(*text.span(column, column + 1))
            column += 1
            heads = ((row, head) for row in range(layer.layout.batch_size) for head in range(layer.layout.num_kv_heads))
            yield _Step(attended=[layer.attended_positions(row, head).tolist() for row, head in heads], out=out)


def _difference(expected: _Step, found: _Step) -> str:
    if expected.attended != found.attended:
        return "offload attends to other tokens than dense"
    if not torch.allclose(expected.out, found.out, rtol=TOLERANCE, atol=TOLERANCE):
        return "offload gives another output than dense"
    return ""
