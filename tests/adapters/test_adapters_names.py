import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.adapters import canonical_name

SPELLINGS = {
    "layers.0.self_attn.q_proj": [
        "model.layers.0.self_attn.q_proj.weight",
        "layers.0.self_attn.q_proj.weight",
        "base_model.model.model.layers.0.self_attn.q_proj",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.my-adapter.weight",
        "base_model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "thinker.model.layers.0.self_attn.q_proj.weight",
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "module.base_model.model.model.layers.0.self_attn.q_proj",
        "_orig_mod.base_model.model.model.layers.0.self_attn.q_proj",
        "module._orig_mod.base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj",
        "_fsdp_wrapped_module.base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_A.default",
    ],
    "layers.11.mlp.down_proj": [
        "model.layers.11.mlp.down_proj.weight",
        "base_model.model.model.layers.11.mlp.down_proj.lora_B.default.weight",
    ],
    "h.0.attn.c_attn": [
        "transformer.h.0.attn.c_attn.weight",
        "h.0.attn.c_attn.weight",
        "base_model.model.transformer.h.0.attn.c_attn",
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight",
    ],
    "vision_tower.encoder.layers.0.mlp.fc1": [
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1",
    ],
    "vision_model.encoder.layers.0.mlp.fc1": [
        "model.vision_model.vision_model.encoder.layers.0.mlp.fc1.weight",
        "vision_model.encoder.layers.0.mlp.fc1.weight",
    ],
    "visual.blocks.0.attn.qkv": ["visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"],
    "layers.0.mlp.experts.7.gate_proj": [
        "model.layers.0.block_sparse_moe.experts.7.w1.weight",
        "model.layers.0.mlp.experts.7.gate_proj.weight",
        "base_model.model.model.layers.0.block_sparse_moe.experts.7.w1.lora_B.default.weight",
    ],
    "layers.0.mlp.experts.7.down_proj": ["model.layers.0.block_sparse_moe.experts.7.w2.weight"],
    "layers.0.mlp.experts.7.up_proj": ["model.layers.0.block_sparse_moe.experts.7.w3.weight"],
    "layers.0.mlp.router": ["model.layers.0.block_sparse_moe.router.layer.weight", "model.layers.0.mlp.router"],
    "layers.0.feed_forward.w1": ["model.layers.0.feed_forward.w1.weight"],
    "embed_tokens": [
        "model.language_model.embed_tokens.weight",
        "model.embed_tokens.weight",
        "base_model.model.model.embed_tokens",
        "base_model.model.model.embed_tokens.base_layer.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B.default",
    ],
    "wte": ["transformer.wte.weight", "wte.weight", "base_model.model.transformer.wte.lora_embedding_A.default"],
    "lm_head": [
        "lm_head.weight",
        "language_model.lm_head.weight",
        "base_model.model.lm_head",
        "base_model.model.lm_head.lora_A.weight",
    ],
}
FAMILIES = {
    "LlamaForCausalLM": {"num_key_value_heads": 2},
    "Qwen2ForCausalLM": {"num_key_value_heads": 2},
    "GPT2LMHeadModel": {},
    "GPTNeoXForCausalLM": {},
    "GemmaForCausalLM": {"num_key_value_heads": 1, "head_dim": 8},
    "MistralForCausalLM": {"num_key_value_heads": 2},
}
WRAPPERS = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "module"]
FACTORS = ["lora_A", "lora_B", "lora_embedding_A", "default", "weight", "bias"]
PATHS = ["model", "transformer", "base_model", "language_model", "thinker", "layers", "0", "q_proj", "lm_head"]
RENAMED = ["vision_tower", "vision_model", "block_sparse_moe", "experts", "w1", "router", "layer"]
PARTS = st.sampled_from([*WRAPPERS, *FACTORS, *PATHS, *RENAMED])


@pytest.mark.parametrize(("spelling", "name"), [(s, n) for n, all_of in SPELLINGS.items() for s in all_of])
def test_every_spelling_has_one_name(spelling, name):
    assert canonical_name(spelling) == name


@given(st.lists(PARTS, max_size=8).map(".".join) | st.text(max_size=30))
def test_canonical_name_is_idempotent(name):
    assert canonical_name(canonical_name(name)) == canonical_name(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_weights_of_a_real_model_share_a_name(family):
    config = getattr(transformers, family).config_class(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
        **FAMILIES[family],
    )
    with torch.device("meta"):
        model = getattr(transformers, family)(config)
    names = [canonical_name(key) for key in model.state_dict() if key.endswith(".weight")]
    assert len(set(names)) == len(names) > 10
