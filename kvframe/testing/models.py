"""Tiny random models, and runs of them under a policy."""

import functools
from typing import TYPE_CHECKING, Any, cast

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.composition import Policy
from kvframe.registry import Registry
from kvframe.testing.cases import Case, Heads, attended
from kvframe.types import Execution

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@functools.cache
def tiny_llama(
    *,
    num_layers: int = 2,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
) -> "PreTrainedModel":
    """A random Llama with four query heads; its weights are large enough for attention to be far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=8192,
        initializer_range=0.4,
    )
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    return cast("PreTrainedModel", model.to(dtype).eval())


@frozen(kw_only=True, eq=False)
class ModelInputs:
    """Token ids of all turns, with the mask and positions that left padding asks for."""

    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    positions: Tensor  # [B, T]

    def span(self, start: int, stop: int) -> dict[str, Tensor]:
        """Arguments of a forward pass over the columns [start, stop)."""
        return {
            "input_ids": self.ids[:, start:stop],
            "attention_mask": self.mask[:, :stop],
            "position_ids": self.positions[:, start:stop],
        }

    def row(self, batch: int, padding: int) -> "ModelInputs":
        """One sequence alone, without its padding."""
        own = (slice(batch, batch + 1), slice(padding, None))
        return ModelInputs(ids=self.ids[own], mask=self.mask[own], positions=self.positions[own])


def model_inputs(case: Case) -> ModelInputs:
    """Random ids for a case."""
    generator = torch.Generator().manual_seed(case.seed)
    ids = torch.randint(3, 64, (case.batch_size, case.num_tokens), generator=generator)
    mask = torch.arange(case.num_tokens) >= torch.tensor(case.padding)[:, None]
    return ModelInputs(ids=ids, mask=mask.long(), positions=(mask.cumsum(1) - 1).clamp(min=0))


@frozen(kw_only=True, eq=False)
class ModelTrace:
    """What came out of a model."""

    logits: list[Tensor] = field(factory=list)
    """Of every call, zero at padding."""
    attended: list[list[Heads]] = field(factory=list)
    """Positions attended to by every decode step in every layer."""


@torch.no_grad()
def play_model(
    model: "PreTrainedModel",
    policy: Policy,
    case: Case,
    execution: Execution,
    inputs: ModelInputs | None = None,
    registry: Registry | None = None,
) -> ModelTrace:
    """All calls of a case by an attached model; `case` gives the batch, not the model's heads.

    registry: whose plugins check the policy and bring attention kernels; the installed ones unless given.
    """
    from kvframe.hf import attach

    inputs, trace = inputs or model_inputs(case), ModelTrace()
    with attach(model, policy, execution=execution, registry=registry) as run:
        cache = run.new_cache(case.num_tokens)
        for call in case.calls():
            cache.prompt_end = call.stop if call.is_prompt else None
            logits = model(**inputs.span(call.start, call.stop), past_key_values=cache).logits
            trace.logits.append(logits * inputs.mask[:, call.start : call.stop, None])
            if not call.is_prompt:
                runtimes = [layer.runtime for layer in cache.managed_layers]
                trace.attended.append([attended(runtime) for runtime in runtimes if runtime is not None])
    return trace


@torch.no_grad()
def play_stock(model: "PreTrainedModel", case: Case) -> list[Tensor]:
    """Logits of all calls of a case by the model as it is, from one forward pass over everything."""
    inputs = model_inputs(case)
    logits = model(**inputs.span(0, case.num_tokens)).logits * inputs.mask[..., None]
    return [logits[:, call.start : call.stop] for call in case.calls()]
