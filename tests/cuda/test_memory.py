"""Device memory is checked before a prompt is read."""

import gc

import pytest
import torch
from on_cuda import generate, small
from transformers import LlamaConfig, LlamaForCausalLM

import kvframe
from kvframe.errors import DeviceMemoryError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_what_cannot_fit_is_refused() -> None:
    """With the figures, and with nothing changed: the same model runs once there is room."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).cuda().eval()
    gc.collect()
    torch.cuda.empty_cache()
    # Tests before this one may have left memory that torch keeps for itself, which is room as well.
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    wide = small("louiskv", 16).swap(window_size=200_000 + kept // 256)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total)
    try:
        with (
            kvframe.attach(model, wide),
            pytest.raises(DeviceMemoryError, match="on the device for 130"),
        ):
            generate(model)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    with kvframe.attach(model, wide):
        generate(model)
