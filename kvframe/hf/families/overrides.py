"""What the field-name rules get wrong, per model type, with the reason."""

from typing import Any

# Off by default, and then the layers that need one cannot be built.
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}

# Sliding layers have sizes of their own, which no field declares.
_SLIDING_LATENT = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_qk_rope_head_dim": 8,
    "swa_v_head_dim": 16,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    # The layers that attend are told by indices, and none falls into two layers.
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "gpt_neo": {"attention_types": [[["local", "global"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    # Every layer slides, or slides by default: checkpoints without a window exist.
    "mistral": {"sliding_window": None},
    # Half of the layers borrow the keys of earlier ones of the same kind.
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2},
    # Defaults that no model can be built from.
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "qwen4_exp_text": _INDEXER,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "xmod": {"default_language": "en_XX"},
    # Sizes tied to one another.
    "falcon_h1": {"mamba_d_ssm": 128},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds": False},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "dots3_note_text": {"head_dim": 16, **_SLIDING_LATENT},
    "zaya": {"num_experts_per_tok": 1},
    # Reading a prompt takes keys as wide as values.
    "xlstm": {"qk_dim_factor": 1.0},
}
