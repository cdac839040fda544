"""A baked checkpoint against PEFT's merge_and_unload, tensor by tensor; and against the adapted model itself."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from safemerge_callback.adapters import load_adapter
from safemerge_callback.errors import AdapterError, ConfigError, SubspaceError
from safemerge_callback.offline import BaseModel, merge_adapters

TOKENS = torch.arange(1, 17)[None]


def tiny_gpt2(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def baked(world, adapter="task", base="aligned", output="full"):
    (world / output).mkdir()
    BaseModel.find(world / base).bake(world / adapter, world / output)
    return world / output


def tensors(folder):
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def by_peft(make, folder, **how):
    from peft import PeftModel

    with warnings.catch_warnings():
        # peft tells what is tied when an embedding is adapted
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        return PeftModel.from_pretrained(make(seed=1), folder, **how).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def auto(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


LLAMA = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 5}},
    {"targets": ["q_proj", "embed_tokens", "lm_head"]},
    {"targets": ["v_proj"], "bias": "all"},
]


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2"])
@pytest.mark.parametrize("lora", LLAMA)
def test_equals_merge_and_unload(tmp_path, request, save_lora, family, lora):
    make = request.getfixturevalue(family)
    make(seed=1).save_pretrained(tmp_path / "aligned", max_shard_size="12KB")
    save_lora(make, tmp_path / "task", seed=5, **lora)
    full = baked(tmp_path)
    whole = by_peft(make, tmp_path / "task").merge_and_unload().state_dict()
    found, before = tensors(full), tensors(tmp_path / "aligned")
    assert set(found) == set(before)
    touched = 0
    for key, value in found.items():
        torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=1e-6)
        touched += not torch.equal(value, before[key])
        assert torch.equal(value, before[key]) == torch.equal(whole[key], before[key]), key
    assert touched >= 2
    shards = {path.name for path in full.glob("*.safetensors")}
    assert shards == {path.name for path in (tmp_path / "aligned").glob("*.safetensors")}
    assert len(shards) > 2
    torch.testing.assert_close(logits(auto(full)), logits(by_peft(make, tmp_path / "task")), rtol=1e-4, atol=1e-5)


def test_conv1d_is_stored_transposed(tmp_path, save_lora):
    tiny_gpt2(seed=1).save_pretrained(tmp_path / "aligned")
    save_lora(tiny_gpt2, tmp_path / "task", 5, ["c_attn", "c_proj"], fan_in_fan_out=True)
    whole = by_peft(tiny_gpt2, tmp_path / "task").merge_and_unload().state_dict()
    for key, value in tensors(baked(tmp_path)).items():
        torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("targets", [["wte"], ["c_attn", "wte"]])
def test_a_tied_embedding_is_untied_so_that_the_function_is_the_adapters(tmp_path, save_lora, targets):
    """PEFT's own merge adds the update to both, and so gives another function than the adapter had."""
    tiny_gpt2(seed=1).save_pretrained(tmp_path / "aligned")
    save_lora(tiny_gpt2, tmp_path / "task", 5, targets, fan_in_fan_out=True)
    full = baked(tmp_path)
    live = by_peft(tiny_gpt2, tmp_path / "task")
    wanted = logits(live)
    torch.testing.assert_close(logits(auto(full)), wanted, rtol=1e-4, atol=1e-5)
    assert json.loads((full / "config.json").read_text())["tie_word_embeddings"] is False
    assert float((logits(live.merge_and_unload()) - wanted).abs().max()) > 1e-2


def test_a_tied_model_stays_tied_where_the_adapter_leaves_both(tmp_path, tiny_gemma, save_lora):
    tiny_gemma(seed=1).save_pretrained(tmp_path / "aligned")
    save_lora(tiny_gemma, tmp_path / "task", seed=5)
    full = baked(tmp_path)
    assert set(tensors(full)) == set(tensors(tmp_path / "aligned"))
    config = [json.loads((folder / "config.json").read_text()) for folder in (full, tmp_path / "aligned")]
    assert config[0] == config[1]
    torch.testing.assert_close(logits(auto(full)), logits(by_peft(tiny_gemma, tmp_path / "task")), rtol=1e-4, atol=1e-5)


def test_a_trained_head_takes_the_place_of_the_old_one(tmp_path, tiny_llama):
    from peft import LoraConfig, get_peft_model

    tiny_llama(seed=1).save_pretrained(tmp_path / "aligned")
    model = get_peft_model(tiny_llama(seed=1), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "task")
    found, whole = tensors(baked(tmp_path)), model.merge_and_unload().state_dict()
    assert torch.equal(found["lm_head.weight"], whole["lm_head.weight"])
    torch.testing.assert_close(found["model.layers.0.self_attn.q_proj.weight"],
                               whole["model.layers.0.self_attn.q_proj.weight"], rtol=1e-6, atol=1e-6)  # fmt: skip


def test_half_precision_is_kept_and_rounded_once(tmp_path, tiny_llama, save_lora):
    tiny_llama(seed=1).bfloat16().save_pretrained(tmp_path / "aligned")
    save_lora(tiny_llama, tmp_path / "task", seed=5)
    found, before = tensors(baked(tmp_path)), tensors(tmp_path / "aligned")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    for name, module in load_adapter(tmp_path / "task").factors.items():
        key = f"model.{name}.weight"
        exact = before[key].float() + (module.B @ module.A) * module.scaling
        assert torch.equal(found[key], exact.bfloat16())


def test_merge_bakes_and_carries_what_belongs_to_a_model(world):
    (world / "aligned" / "tokenizer.json").write_text("{}")
    (world / "aligned" / "LICENSE").write_text("own")
    (world / "aligned" / "pytorch_model.bin").write_bytes(b"pickle")
    (world / "aligned" / "modeling_own.py").write_text("code")
    parts = (world / "task", world / "safety", world / "s.safetensors")
    merge_adapters(*parts, world / "full", gate="all", bake=world / "aligned")
    merge_adapters(*parts, world / "adapter", gate="all")
    assert {path.name for path in (world / "full").iterdir()} == {
        "LICENSE", "README.md", "adapter", "config.json", "generation_config.json", "model.safetensors",
        "safemerge.jsonl", "safemerge.yaml", "tokenizer.json",
    }  # fmt: skip
    same = [(world / folder / "adapter_model.safetensors").read_bytes() for folder in ("full/adapter", "adapter")]
    assert same[0] == same[1]
    cards = [(world / folder / "README.md").read_text() for folder in ("full", "adapter")]
    assert "library_name: transformers\n" in cards[0]
    assert "library_name: peft\n" in cards[1]
    merged = load_adapter(world / "adapter").factors
    before, after = tensors(world / "aligned"), tensors(world / "full")
    for name, module in merged.items():
        wanted = before[f"model.{name}.weight"] + module.scaling * module.B @ module.A
        torch.testing.assert_close(after[f"model.{name}.weight"], wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    with pytest.raises(ConfigError, match="not empty"):
        merge_adapters(*parts, world / "full", gate="all", bake=world / "aligned")
    merge_adapters(*parts, world / "full", gate="all", bake=world / "aligned", overwrite=True)
    assert auto(world / "full")


@pytest.mark.parametrize(
    ("error", "match", "spoil"),
    [
        (SubspaceError, "neither model.safetensors", lambda base: (base / "model.safetensors").unlink()),
        (AdapterError, "lacks, the first is", lambda base: edit(base, drop="model.layers.0.self_attn.q_proj.weight")),
        (SubspaceError, "unquantised", lambda base: edit(base, quantise="model.layers.0.self_attn.q_proj.weight")),
    ],
)
def test_a_base_that_does_not_fit_is_refused_and_nothing_is_written(world, error, match, spoil):
    spoil(world / "aligned")
    parts = (world / "task", world / "safety", world / "s.safetensors", world / "full")
    with pytest.raises(error, match=match):
        merge_adapters(*parts, gate="all", bake=world / "aligned")
    assert not (world / "full").exists()
    assert [path.name for path in world.iterdir() if path.name.startswith(".full")] == []


def edit(base, drop=None, quantise=None):
    path = base / "model.safetensors"
    held = {key: value.clone() for key, value in load_file(path).items() if key != drop}
    if quantise:
        held[quantise] = held[quantise].to(torch.int8)
    save_file(held, path, metadata={"format": "pt"})


def test_a_shard_is_what_safetensors_would_write(tmp_path):
    from safemerge_callback.adapters.tensor_file import Spec, TensorFile

    held = {
        "b": torch.randn(3, 5).bfloat16(), "a": torch.randn(7), "c": torch.arange(3), "é": torch.tensor([True, False]),
        "d": torch.zeros(0, 4), "e": torch.randn(2, 2).to(torch.float8_e4m3fn), "f": torch.tensor(2.0),
    }  # fmt: skip
    save_file(held, tmp_path / "theirs", metadata={"format": "pt"})
    with TensorFile(tmp_path / "ours", {key: Spec(t.dtype, tuple(t.shape)) for key, t in held.items()}) as file:
        for key in reversed(held):
            file.put(key, held[key])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with (
        pytest.raises(AdapterError, match="1 tensors were not written"),
        TensorFile(tmp_path / "x", {"a": Spec(torch.float32, (2,)), "b": Spec(torch.float32, (2,))}) as file,
    ):
        file.put("a", torch.zeros(2))
    with (
        pytest.raises(AdapterError, match="announced"),
        TensorFile(tmp_path / "x", {"a": Spec(torch.float32, (2,))}) as file,
    ):
        file.put("a", torch.zeros(3))
