"""Whatever layout a checkpoint has, V under a live module's name is the difference of that module's live weights."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from safemerge_callback.adapters import canonical_name
from safemerge_callback.errors import SubspaceError
from safemerge_callback.live import live_factors
from safemerge_callback.subspace import CheckpointShards, build_subspace
from safemerge_callback.subspace.checkpoints.targets import select_targets
from tests.support.versions import above_bound, found_in

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MOE = {**EXPERTS, "num_experts": 3}
SHARED = {"shared_expert_intermediate_size": 40}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}
MINIMAX = {
    **EXPERTS,
    **DENSE_FIRST,
    "num_local_experts": 3,
    "dense_intermediate_size": 48,
    "shared_intermediate_size": 40,
}
LLAMA4 = {**EXPERTS, "num_local_experts": 3, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 1}
GEMMA = {"tie_word_embeddings": True}


def vlm(text_type, **more):
    vision = {"model_type": more.pop("vision", "siglip_vision_model"), **VISION}
    return {"text_config": {"model_type": text_type, **TEXT}, "vision_config": vision, **more}


QWEN_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
QWEN_VL = {
    "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    "vision_config": QWEN_VISION,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64}
FAMILIES = {
    "LlamaForCausalLM": TEXT,
    "Qwen2ForCausalLM": TEXT,
    "GemmaForCausalLM": TEXT | GEMMA,
    "Gemma2ForCausalLM": TEXT | GEMMA,
    "Gemma3ForCausalLM": TEXT | GEMMA,
    "Phi3ForCausalLM": TEXT,
    "GPT2LMHeadModel": GPT2,
    "GPTNeoXForCausalLM": TEXT,
    "MixtralForCausalLM": TEXT | EXPERTS | {"num_local_experts": 3},
    "Qwen2MoeForCausalLM": TEXT | MOE | SHARED,
    "Qwen3MoeForCausalLM": TEXT | MOE,
    "PhimoeForCausalLM": TEXT | EXPERTS | {"num_local_experts": 3},
    "GraniteMoeForCausalLM": TEXT | EXPERTS | {"num_local_experts": 3},
    "GptOssForCausalLM": TEXT | EXPERTS | {"num_local_experts": 3},
    "Llama4ForCausalLM": TEXT | LLAMA4,
    "HrmTextForCausalLM": TEXT,
    "HYV3ForCausalLM": TEXT | MOE | DENSE_FIRST | {"num_shared_experts": 1},
    "LagunaForCausalLM": TEXT | MOE | DENSE_FIRST | SHARED | {"num_attention_heads_per_layer": [4, 4]},
    "MiniMaxM3SparseForConditionalGeneration": {"text_config": TEXT | MINIMAX, "vision_config": VISION},
    "LlavaForConditionalGeneration": vlm("llama", vision="clip_vision_model"),
    "PaliGemmaForConditionalGeneration": vlm("gemma"),
    "Gemma3ForConditionalGeneration": vlm("gemma3_text", mm_tokens_per_image=1),
    "Mistral3ForConditionalGeneration": vlm("mistral", vision="pixtral"),
    "Qwen2VLForConditionalGeneration": QWEN_VL,
}
# Where PEFT's "all-linear" also adapts the stacked experts, which is refused as no plain LoRA.
PEFT_ON_EXPERTS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
# As transformers writes it (for experts and prefixes the layout of the original release), and as the model has it.
LAYOUTS = {"original": True, "as the model has it": False}


def make(family, seed, dtype=torch.float32):
    cls = found_in(transformers, family)
    torch.manual_seed(seed)
    return cls(cls.config_class(**FAMILIES[family])).to(dtype)


def lora_on_all_linear(model):
    """LoRA on every linear layer; PEFT's own "all-linear" also adapts stacked experts in Mixtral-like models."""
    conv1d = isinstance(model, transformers.GPT2PreTrainedModel)
    head = model.get_output_embeddings()
    targets = [path for path in linear_paths(model) if model.get_submodule(path) is not head]
    return get_peft_model(model, LoraConfig(target_modules=targets, r=2, fan_in_fan_out=conv1d))


def linear_paths(model):
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return [path for path, module in model.named_modules() if isinstance(module, kinds)]


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def live_weights(model):
    return {canonical_name(path): model.get_submodule(path).weight.detach() for path in linear_paths(model)}


@pytest.mark.parametrize("original", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_live_lora_module_is_found_with_the_difference_of_the_live_weights(family, original, tmp_path):
    folders = [
        saved(make(family, seed), tmp_path / str(seed), save_original_format=original, max_shard_size="40KB")
        for seed in (1, 2)
    ]
    cls = found_in(transformers, family)
    aligned, unaligned = (cls.from_pretrained(folder) for folder in folders)
    before, after = live_weights(unaligned), live_weights(aligned)
    subspace = build_subspace(tmp_path / "V.safetensors", aligned=folders[0], unaligned=folders[1], progress=False)
    factors = live_factors(lora_on_all_linear(aligned))
    assert len(factors) > 7
    subspace.check(factors)
    for name, live in factors.items():
        V = subspace.stack([name], transposed=live.transposed)
        assert V.shape == (1, *live.shape)
        expected = after[name] - before[name]
        assert torch.equal(V[0], expected.mT if live.transposed else expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_by_default_the_linear_layers_of_the_model_are_chosen_and_at_most_routers_beside(family, tmp_path):
    model = make(family, 1)
    chosen = set(select_targets(CheckpointShards.open(saved(model, tmp_path)).names, None))
    live = set(live_factors(lora_on_all_linear(model)))
    assert live <= chosen
    assert all(name.endswith((".router", ".router.gate")) for name in chosen - live)


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family not in ("GPT2LMHeadModel", *PEFT_ON_EXPERTS)]
)
def test_by_default_all_is_chosen_that_peft_calls_all_linear(family, tmp_path):
    model = make(family, 1)
    chosen = select_targets(CheckpointShards.open(saved(model, tmp_path)).names, "all-linear")
    live = live_factors(get_peft_model(model, LoraConfig(target_modules="all-linear", r=2)))
    assert live.keys() <= set(chosen)


MOES = [
    *(family for family in FAMILIES if "Moe" in family),
    "MixtralForCausalLM",
    "MiniMaxM3SparseForConditionalGeneration",
]


@pytest.mark.parametrize("family", MOES)
def test_experts_one_by_one_and_stacked_are_the_same_modules(family, tmp_path):
    model = make(family, 1, torch.bfloat16)
    one_by_one = CheckpointShards.open(saved(model, tmp_path / "original"))
    stacked = CheckpointShards.open(saved(model, tmp_path / "stacked", save_original_format=False))
    assert one_by_one.names.keys() == stacked.names.keys()
    for name in one_by_one.names:
        assert one_by_one.shape(name) == stacked.shape(name)
        assert torch.equal(one_by_one.read(name), stacked.read(name))
    if family == "GraniteMoeForCausalLM":
        above_bound("transformers", "experts are stacked in one module")
    (experts,) = (m for path, m in model.named_modules() if ".1." in path and path.endswith(".experts"))
    for expert in range(3):
        parts = [stacked.read(f"layers.1.mlp.experts.{expert}.{part}") for part in ("gate_proj", "up_proj")]
        assert torch.equal(torch.cat(parts), experts.gate_up_proj[expert])
        assert torch.equal(stacked.read(f"layers.1.mlp.experts.{expert}.down_proj"), experts.down_proj[expert])


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "LlavaForConditionalGeneration", "HrmTextForCausalLM"])
def test_two_checkpoints_in_different_layouts_are_subtracted_by_module(family, tmp_path):
    models = [make(family, seed) for seed in (1, 2)]
    old = saved(models[0], tmp_path / "old")
    new = saved(models[1], tmp_path / "new", save_original_format=False)
    assert load_file(old / "model.safetensors").keys() != load_file(new / "model.safetensors").keys()
    subspace = build_subspace(tmp_path / "V.safetensors", aligned=old, unaligned=new, progress=False)
    after, before = map(live_weights, models)
    for name in live_factors(lora_on_all_linear(models[0])):
        assert torch.equal(subspace.stack([name])[0], after[name] - before[name])


def test_the_language_model_of_a_vision_language_checkpoint_matches_it_alone(tmp_path):
    whole = make("Gemma3ForConditionalGeneration", 1)
    shards = CheckpointShards.open(saved(whole, tmp_path))
    alone = make("Gemma3ForCausalLM", 2)
    for name in live_factors(lora_on_all_linear(alone)):
        assert torch.equal(shards.read(name), live_weights(whole)[name])


PARTS = {"qkv_proj": {"q_proj": 32, "k_proj": 16, "v_proj": 16}, "gate_up_proj": {"gate_proj": 48, "up_proj": 48}}


def split_phi3(fused, folder):
    """The same checkpoint with its fused layers apart."""
    apart = {}
    for key, tensor in load_file(fused / "model.safetensors").items():
        parent, last = key.removesuffix(".weight").rpartition(".")[::2]
        if last in PARTS:
            pieces = tensor.split(list(PARTS[last].values()))
            apart |= {f"{parent}.{part}.weight": p.contiguous() for part, p in zip(PARTS[last], pieces, strict=True)}
        else:
            apart[key] = tensor
    folder.mkdir()
    save_file(apart, folder / "model.safetensors")
    return folder


def test_fused_and_split_layers_answer_to_either_name(tmp_path):
    fused = CheckpointShards.open(saved(make("Phi3ForCausalLM", 1), tmp_path / "fused"))
    split = CheckpointShards.open(split_phi3(tmp_path / "fused", tmp_path / "split"))
    assert fused.names.keys() != split.names.keys()
    for one, other in ((fused, split), (split, fused)):
        renamed = one.named_as(other)
        assert renamed.names.keys() == other.names.keys()
        for name in other.names:
            assert renamed.shape(name) == other.shape(name)
            assert torch.equal(renamed.read(name), other.read(name))
        assert renamed.fingerprint() == one.fingerprint()


def test_v_has_the_layers_of_the_aligned_checkpoint(tmp_path):
    after, before = (make("Phi3ForCausalLM", seed) for seed in (1, 2))
    aligned = saved(after, tmp_path / "aligned")
    unaligned = split_phi3(saved(before, tmp_path / "before"), tmp_path / "unaligned")
    subspace = build_subspace(tmp_path / "V", aligned=aligned, unaligned=unaligned, progress=False)
    weights = live_weights(after), live_weights(before)
    assert subspace.modules.keys() == live_factors(lora_on_all_linear(after)).keys()
    for name in subspace.modules:
        assert torch.equal(subspace.stack([name])[0], weights[0][name] - weights[1][name])
    mirrored = build_subspace(tmp_path / "W", aligned=unaligned, unaligned=aligned, progress=False)
    q, k, v = subspace.stack(["layers.1.self_attn.qkv_proj"])[0].split([32, 16, 16])
    for name, part in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
        assert torch.equal(mirrored.stack([f"layers.1.self_attn.{name}"])[0], -part)


def test_parts_of_different_dtype_are_not_put_together(tmp_path):
    dtypes = {"gate_proj": torch.float32, "up_proj": torch.bfloat16}
    parts = {f"mlp.{name}.weight": torch.zeros(4, 8, dtype=dtype) for name, dtype in dtypes.items()}
    save_file(parts, tmp_path / "split.safetensors")
    save_file({"mlp.gate_up_proj.weight": torch.zeros(8, 8)}, tmp_path / "fused.safetensors")
    split, fused = (CheckpointShards.open(tmp_path / f"{name}.safetensors") for name in ("split", "fused"))
    assert list(split.named_as(fused).names) == ["mlp.gate_proj", "mlp.up_proj"]


def test_a_fused_layer_of_another_height_is_not_split(tmp_path):
    fused = {"layers.0.qkv_proj.weight": torch.zeros(64, 8)}
    split = {f"layers.0.{name}.weight": torch.zeros(16, 8) for name in ("q_proj", "k_proj", "v_proj")}
    save_file(fused, tmp_path / "fused.safetensors")
    save_file(split, tmp_path / "split.safetensors")
    one, other = (CheckpointShards.open(tmp_path / f"{name}.safetensors") for name in ("fused", "split"))
    assert list(one.named_as(other).names) == ["layers.0.qkv_proj"]


def test_stacked_experts_that_are_stored_transposed_stay_whole(tmp_path):
    model = make("GptOssForCausalLM", 1)
    shards = CheckpointShards.open(saved(model, tmp_path))
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(shards.read("layers.1.mlp.experts.2.gate_up_proj"), experts.gate_up_proj[2])
    assert torch.equal(shards.read("layers.1.mlp.experts.2.down_proj"), experts.down_proj[2])


def test_single_experts_are_built_where_they_are_asked_for(tmp_path):
    models = [make("Qwen3MoeForCausalLM", seed) for seed in (1, 2)]
    aligned, unaligned = (saved(m, tmp_path / str(i), save_original_format=bool(i)) for i, m in enumerate(models))
    subspace = build_subspace(
        tmp_path / "V", aligned=aligned, unaligned=unaligned, target_modules=["experts.2.up_proj"], progress=False
    )
    assert list(subspace.modules) == ["layers.0.mlp.experts.2.up_proj", "layers.1.mlp.experts.2.up_proj"]
    up = [m.model.layers[1].mlp.experts.gate_up_proj.detach()[2, 24:] for m in models]
    assert torch.equal(subspace.stack(["layers.1.mlp.experts.2.up_proj"])[0], up[0] - up[1])


def test_two_names_that_are_one_module_are_refused_with_the_checkpoint(tmp_path):
    keys = ["model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"]
    save_file({key: torch.zeros(2, 3) for key in keys}, tmp_path / "some.safetensors")
    with pytest.raises(SubspaceError, match=r"'some.safetensors'.*are both module 'layers.0.mlp.up_proj'"):
        CheckpointShards.open(tmp_path / "some.safetensors")
