"""Small random models of transformers' causal language model classes, built from sizes alone.

Shapes in comments: B batch, T time, V vocabulary.
"""

import inspect
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NEWEST = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="of transformers as they are in 5.24"
)
VOCAB = 56
# Of a decoder's configuration, for tests that make their models themselves.
DECODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}

# Fields of configurations, by their meaning; a class takes those that it has.
_NUMBERS: dict[int, str] = {
    VOCAB: "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size",
    16: """hidden_size d_model n_embd dim_model emb_dim embedding_dim embedding_size word_embed_proj_dim embed_dim
        lru_width attention_hidden_size backbone_hidden_size input_embedding_size output_embedding_size
        moe_latent_size index_head_dim hidden_size_per_layer_input ple_embed_dim head_dim_total chunk_size
        mamba_chunk_size attention_chunk_size linear_chunk_size window_size attention_window_size sliding_window
        sliding_window_size local_attention max_source_positions rel_extent laurel_rank gated_norm_rank
        loop_gate_rank hc_lowrank ssm_state_size mamba_d_state state_size d_state router_hidden_size
        pronunciation_embed_dim shape_embed_dim adapter_rank time_step_rank mamba_dt_rank num_mel_bins
        hidden_size_global out_hidden_size""",
    32: """intermediate_size ffn_dim n_inner d_inner dff dim_ff ffn_hidden_size moe_intermediate_size decoder_ffn_dim
        encoder_ffn_dim expert_ffn_hidden_size shared_intermediate_size shared_expert_intermediate_size
        moe_shared_expert_intermediate_size shared_experts_intermediate_size dense_intermediate_size
        intermediate_size_mlp prefix_dense_intermediate_size feed_forward_size mamba_d_ssm block_ffn_dim
        ffn_round_up_to_multiple_of""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
        num_encoder_layers num_attention_heads n_head n_heads num_heads decoder_attention_heads
        encoder_attention_heads attention_heads num_decoder_attention_heads num_encoder_attention_heads
        num_key_value_heads num_kv_heads num_global_key_value_heads swa_num_attention_heads
        swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts
        linear_num_key_heads linear_num_value_heads linear_num_heads index_n_heads index_topk mamba_num_heads
        n_mamba_heads num_query_groups num_blocks layer_group_size n_layers_per_attn_res_block o_groups hc_mult
        hc_count attn_layer_period expert_layer_period altup_num_inputs heads_per_ngram depth""",
    4: """num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num d_rel conv_kernel
        conv_kernel_size linear_conv_kernel_dim mamba_n_heads short_conv_kernel_size mamba_d_conv num_codebooks
        num_buckets""",
    1: """attn_layer_offset expert_layer_offset n_group topk_group n_groups mamba_n_groups mamba_ngroups
        num_expert_group first_k_dense_replace n_shared_experts num_shared_experts moe_num_shared_experts
        num_dense_layers num_mem_blocks n_input_layers n_recurrent_layers n_output_layers""",
    8: """head_dim d_head dim_head linear_key_head_dim linear_value_head_dim linear_head_dim qk_nope_head_dim
        qk_rope_head_dim v_head_dim kv_lora_rank q_lora_rank o_lora_rank swa_head_dim global_head_dim
        attention_head_dim attention_head_size mamba_head_dim mamba_d_head mamba_headdim kv_channels rotary_dim
        indexer_head_dim""",
    64: """max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length max_target_positions
        seq_length""",
    0: "num_nextn_predict_layers num_mtp_layers num_kv_shared_layers",
}  # fmt: skip
_SIZES: dict[str, Any] = {name: number for number, names in _NUMBERS.items() for name in names.split()}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "decoder_start_token_id": 1}

# Fields that decide the function of the logits, with values at which leaving it out would be seen.
_FUNCTION: dict[str, Any] = {
    "final_logit_softcapping": 20.0,
    "logit_scale": 0.125,
    "logits_scaling": 8.0,
    "lm_head_multiplier": 0.25,
    "output_multiplier": 0.5,
    "logits_mup_width_multiplier": 2.0,
    "unpadded_vocab_size": VOCAB - 6,
}

_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
# What the fields above do not reach, by the configuration's class: sizes that depend on one another, and kinds of
# layers of which two must be there.
_BY_HAND: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {"encoder_hash_byte_group_vocab": VOCAB, "encoder_hash_byte_group_size": [3]},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "DbrxConfig": {"attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
                   "ffn_config": {"ffn_hidden_size": 32}},
    "DoryConfig": {"num_hidden_layers": 3},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma4TextConfig": {"hidden_size_per_layer_input": 0},
    "GraniteMoeHybridConfig": _LINEAR_THEN_FULL,
    "HyperCLOVAXConfig": {"logits_scaling": 0.125},
    "KimiLinearConfig": _LINEAR_THEN_FULL,
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Lfm3Config": {"layer_types": ["conv", "full_attention"]},
    "Mamba2Config": {"head_dim": 16},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4},
    "Qwen3NextConfig": _LINEAR_THEN_FULL,
    "Qwen3_5MoeTextConfig": _LINEAR_THEN_FULL,
    "Qwen3_5TextConfig": _LINEAR_THEN_FULL,
    "Qwen4ExpTextConfig": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
                           "indexer_compress_ratio": 2, "layer_types": ["linear_attention", "indexed_attention"]},
    "RecurrentGemmaConfig": {"block_types": ["recurrent", "attention"]},
    "ReformerConfig": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "RwkvConfig": {"use_cache": False},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {"attention_hidden_size": 32, "attention_head_dim": 16, "num_hidden_layers": 3,
                    "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "Zamba2Config": {"layers_block_type": ["linear_attention", "hybrid"]},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "xLSTMConfig": {"hidden_size": 128, "embedding_dim": 128},
}  # fmt: skip


def sizes_of(config_class: type[PreTrainedConfig], **given: Any) -> dict[str, Any]:
    """The arguments with which a configuration class makes a small configuration."""
    fields = getattr(config_class, "__dataclass_fields__", None)  # they are dataclasses since transformers 5.4
    names = set(inspect.signature(config_class).parameters if fields is None else fields)
    names -= set(config_class.attribute_map)
    made = {name: value for name, value in (_SIZES | _TOKENS | _FUNCTION).items() if name in names}
    for name in names & set(config_class.sub_configs):
        part = getattr(_default(config_class), name, None)
        if isinstance(part, PreTrainedConfig):
            made[name] = {"model_type": part.model_type} | sizes_of(type(part))
    return made | _BY_HAND.get(config_class.__name__, {}) | given


def _default(config_class: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    try:
        return config_class()
    except Exception:  # some have no defaults that they accept themselves
        return None


def class_names() -> list[str]:
    """Every class of transformers' registry of causal language models, once, in its order."""
    return list(dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def build(class_name: str, *, score_std: float = 15.0, **config: Any) -> PreTrainedModel:
    """A small model with random weights in evaluation mode, whose scores W h are so large that a function matters.

    Args:
        class_name: in transformers. score_std: what the head's weight makes of hidden states of variance one; 0 leaves
            the weight as it is. config: fields of its configuration; of its text part where it has one.
    """
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    model_class: type[PreTrainedModel] = getattr(transformers, class_name)
    config_class: Any = model_class.config_class
    sizes = sizes_of(config_class)
    for name, value in config.items():
        sizes.get("text_config", sizes)[name] = value
    torch.manual_seed(0)
    model = model_class._from_config(config_class(**sizes), attn_implementation="eager").float().eval()
    head = model.get_output_embeddings()
    if score_std and isinstance(getattr(head, "weight", None), Tensor):
        nn.init.normal_(head.weight, std=score_std / head.weight.shape[-1] ** 0.5)
    return model


def batch(vocab_size: int = VOCAB - 6, *, rows: int = 2, time: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Tokens and labels (B, T), of which some are -100, as padding and a prompt leave them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab_size, (rows, time), generator=generator)
    labels = ids.clone()
    labels[0, :3] = -100
    labels[-1, -2:] = -100
    return {"input_ids": ids, "labels": labels}
