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
    "embed_tokens": [
        "model.embed_tokens.weight",
        "base_model.model.model.embed_tokens",
        "base_model.model.model.embed_tokens.base_layer.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B.default",
    ],
    "wte": ["transformer.wte.weight", "wte.weight", "base_model.model.transformer.wte.lora_embedding_A.default"],
    "lm_head": ["lm_head.weight", "base_model.model.lm_head", "base_model.model.lm_head.lora_A.weight"],
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
PARTS = st.sampled_from([*WRAPPERS, *FACTORS, "model", "transformer", "base_model", "layers", "0", "q_proj", "lm_head"])


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
