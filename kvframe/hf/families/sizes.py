"""How small each kind of configuration field becomes, told from the field's name."""

import re

VOCAB_SIZE = 160
"""Tokens of a tiny vocabulary."""

SPECIAL_TOKENS = 16
"""Ids below this are pad, begin, end and the placeholders of other modalities; prompts stay above them."""

NUM_LAYERS = 2
PATTERN_LAYERS = 4
"""Layers of a family that mixes kinds of layer: where two kinds alternate, each comes twice."""

# The first match wins.
_RULES: tuple[tuple[int, str], ...] = (
    (0, r"pad_token_id"),
    (1, r"bos_token_id|decoder_start_token_id|cls_token_id"),
    (2, r"eos_token_id|sep_token_id|eod_token_id"),
    (VOCAB_SIZE, r"\w*vocab_size\w*|encoder_hash_byte_group_vocab"),
    (NUM_LAYERS, r"(num_)?(hidden_|encoder_|decoder_)?layers|n_layers?|depth"),
    (256, r"max_\w*_positions|max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length"),
    (256, r"mem_len|keep_window_size|local_attention_window_len"),
    (16, r"sliding_window(_size)?|attention_window_size|attention_chunk_size|window_size"),
    (2, r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads"),
    (4, r"(\w+_)?num_attention_heads|n_heads?|num_heads"),
    (4, r"(num_)?(encoder_|decoder_)?attention_heads|linear_num_value_heads"),
    (2, r"linear_num_key_heads|index_n_heads|linear_num_heads"),
    (8, r"qk_(rope|nope)_head_dim|rotary_dim"),
    (16, r"(\w+_)?head_dim|d_head|dim_head|kv_channels|attention_head_size|d_kv|mamba_d_head|mamba_headdim"),
    (16, r"query_pre_attn_scalar"),
    (16, r"\w+_lora_rank|laurel_rank|hc_lowrank|adapter_rank|gated_norm_rank"),
    (96, r"\w*intermediate_size\w*|\w*ffn_dim|\w*ffn_hidden_size|feed_forward_size|mlp_dim"),
    (96, r"dff|dim_ff|d_ff|d_inner|n_inner"),
    (2, r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts"),
    (4, r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|zero_expert_num"),
    (1, r"moe_num_shared_experts|num_shared_experts|n_shared_experts|num_dense_layers|first_k_dense_replace"),
    (1, r"n_group|topk_group|num_expert_group|o_groups|mamba_n_groups|mamba_ngroups|n_groups"),
    (16, r"hidden_size_per_layer_input"),
    (64, r"hidden_size|d_model|n_embd|emb_dim|embedding_size|word_embed_proj_dim|lru_width|embedding_dim"),
    (64, r"(input|output)_embedding_size|router_hidden_size|pronunciation_embed_dim|shape_embed_dim"),
    (64, r"nemo_conv_channels|\w+_out_channel|output_channels|adapter_(in|out)_dim|adapter_input_size"),
    (8, r"mamba_d_state|state_size|ssm_state_size|mamba_n_heads|patch_size"),
    (4, r"mamba_dt_rank|time_step_rank"),
    (16, r"\w*chunk_size|block_size|image_size"),
)


def tiny_value(name: str) -> int | None:
    """The value of a whole-number field in a tiny configuration, or None to keep the family's own."""
    for value, pattern in _RULES:
        if re.fullmatch(pattern, name):
            return value
    return None
