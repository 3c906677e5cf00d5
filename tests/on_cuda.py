"""What the tests on a CUDA device share."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import kvframe
from kvframe.registry import default_registry
from kvframe.stages import SLOTS, Stage
from kvframe.testing.small import small_options, with_dense_layers

PROMPT, STEPS = 90, 40


def tiny_model(hidden_size: int) -> LlamaForCausalLM:
    """A tiny random model in float32, eight query heads over two KV heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden_size,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def padded_prompt() -> dict[str, Tensor]:
    """Two rows, the second with left padding."""
    torch.manual_seed(1)
    ids = torch.randint(3, 256, (2, PROMPT), device="cuda")
    mask = torch.ones_like(ids)
    ids[1, :23], mask[1, :23] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: LlamaForCausalLM, **options: object) -> tuple[Tensor, Tensor]:
    """Tokens and logits of a greedy run."""
    out = model.generate(
        **padded_prompt(),
        do_sample=False,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits)


def small(name: str, token_budget: int) -> kvframe.Policy:
    """A policy with sizes that fit a short text."""
    options = {
        "token_budget": token_budget, "sink_size": 4, "window_size": 16, "cluster_size": 4, "page_size": 4,
        "dense_layers": (),
    }  # fmt: skip
    record = default_registry().policy_spec(name)
    known = {**small_options(record.config_cls), **options}
    names = {field.name for field in record.config_cls.__attrs_attrs__}
    policy = kvframe.policy(name, **{key: value for key, value in known.items() if key in names})
    return with_dense_layers(policy, ())


def capturable_policies() -> list[str]:
    """The names of policies whose stages all say that a CUDA graph can repeat them."""
    names = [record.name for record in default_registry().policies()]
    return [name for name in names if all(part.capturable for part in parts_of(small(name, 16)))]


def parts_of(policy: kvframe.Policy) -> list[Stage]:
    """Every stage of a policy, and those that they are made of."""
    return [part for slot in SLOTS for part in policy.stage(slot).with_parts()]
