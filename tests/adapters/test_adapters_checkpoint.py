import json
import shutil
from dataclasses import replace

import huggingface_hub.constants
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from safemerge_callback.adapters import LoraFactors, canonical_name, load_adapter, save_adapter
from safemerge_callback.errors import AdapterError
from safemerge_callback.live import live_factors
from safemerge_callback.ops import weighted_sum

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SETTINGS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": r".*\.(k|v)_proj", "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "lm_head"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, "lm_head": 9},
    },
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "alpha_pattern": {"embed_tokens": 3}},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True, "rank_pattern": {"wte": 2}},
}
TOKENS = torch.arange(1, 13).reshape(2, 6)


@pytest.fixture
def base(tiny_llama, tiny_qwen2):
    def make(kind):
        if kind != "gpt2":
            return (tiny_qwen2 if kind == "rslora" else tiny_llama)().eval()
        config = transformers.GPT2Config(
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).eval()

    return make


@pytest.fixture
def saved(base, tmp_path):
    """A model and the folder that PEFT itself writes of it."""

    def make(kind="plain", folder="peft", **settings):
        config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **{**SETTINGS[kind], **settings})
        model = get_peft_model(base(kind), config).eval()
        model.save_pretrained(tmp_path / folder, save_embedding_layers=False)
        return model, tmp_path / folder

    return make


def deltas(model):
    layers = {canonical_name(path): m for path, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def delta(factors):
    product = (factors.B @ factors.A).detach()
    return (product.T if factors.transposed else product) * factors.scaling


def reloaded(base, kind, folder):
    return PeftModel.from_pretrained(base(kind), folder).eval()


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS)


@pytest.mark.parametrize("kind", SETTINGS)
def test_folder_gives_exactly_pefts_own_update(saved, kind):
    model, folder = saved(kind)
    adapter, expected, live = load_adapter(folder), deltas(model), live_factors(model)
    assert set(adapter.factors) == set(expected)
    assert adapter.extra == {}
    for name, factors in adapter.factors.items():
        assert torch.equal(delta(factors), expected[name]), name
        assert (factors.scaling, factors.transposed) == (live[name].scaling, live[name].transposed)


@pytest.mark.parametrize("kind", SETTINGS)
def test_unchanged_adapter_saved_again_is_the_same_to_peft(saved, base, kind, tmp_path):
    model, folder = saved(kind)
    adapter = load_adapter(folder)
    again = save_adapter(tmp_path / "again", adapter)
    assert sorted(p.name for p in again.iterdir()) == [CONFIG, WEIGHTS]
    assert json.loads((again / CONFIG).read_text()) == json.loads((folder / CONFIG).read_text())
    other = reloaded(base, kind, again)
    expected = deltas(model)
    assert all(torch.equal(found, expected[name]) for name, found in deltas(other).items())
    with torch.no_grad():
        assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


def stacked(factors, times, scaling):
    """The same module with `times` the rank and another update, of another scaling."""
    parts = [factors.low_rank()] * times
    A, B = weighted_sum(parts, [0.5, -2.0, 1.0][:times])
    return replace(factors, A=A, B=B, scaling=scaling)


@pytest.mark.parametrize("kind", SETTINGS)
def test_changed_ranks_and_scalings_reach_peft(saved, base, kind, tmp_path):
    _, folder = saved(kind)
    adapter = load_adapter(folder)
    changed = {
        name: stacked(factors, 1 + index % 3, (1.0, 0.7, 1 / 3)[index % 3])
        for index, (name, factors) in enumerate(adapter.factors.items())
    }
    out = save_adapter(tmp_path / "out", replace(adapter, factors=changed))
    other = reloaded(base, kind, out)
    for name, found in deltas(other).items():
        torch.testing.assert_close(found, delta(changed[name]), rtol=1e-6, atol=1e-8)
    assert {n: f.rank for n, f in live_factors(other).items()} == {n: f.rank for n, f in changed.items()}
    back = load_adapter(out).factors
    assert all(torch.equal(back[n].B, f.B) and back[n].scaling == pytest.approx(f.scaling) for n, f in changed.items())
    dense = base(kind)
    with torch.no_grad():
        for path, module in dense.named_modules():
            if canonical_name(path) in changed:
                module.weight += delta(changed[canonical_name(path)])
        torch.testing.assert_close(other(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_many_layers_get_patterns_of_their_own(tiny_llama, tmp_path):
    """layers.1 and layers.11 must not be taken for one another."""
    big = {"num_hidden_layers": 12}
    model = get_peft_model(tiny_llama(**big), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    adapter = load_adapter(tmp_path / "peft")
    changed = dict(adapter.factors)
    changed["layers.1.self_attn.q_proj"] = stacked(changed["layers.1.self_attn.q_proj"], 3, 0.5)
    out = save_adapter(tmp_path / "out", replace(adapter, factors=changed))
    found = live_factors(PeftModel.from_pretrained(tiny_llama(**big), out))
    assert {n for n, f in found.items() if f.rank == 6} == {"layers.1.self_attn.q_proj"}
    assert {n for n, f in found.items() if f.scaling == 0.5} == {"layers.1.self_attn.q_proj"}


def test_trained_heads_and_embeddings_are_carried_along(base, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(base("plain"), config).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    adapter = load_adapter(tmp_path / "peft")
    assert [canonical_name(key) for key in adapter.extra] == ["lm_head"]
    out = save_adapter(tmp_path / "out", adapter)
    with torch.no_grad():
        assert torch.equal(reloaded(base, "plain", out)(TOKENS).logits, model(TOKENS).logits)


def test_bfloat16_stays_bfloat16(saved, tmp_path):
    _, folder = saved()
    change_tensors(folder, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    out = save_adapter(tmp_path / "out", load_adapter(folder))
    assert {f.A.dtype for f in load_adapter(out).factors.values()} == {torch.bfloat16}


def test_saving_over_an_adapter_keeps_other_files_and_leaves_nothing_aside(saved, tmp_path):
    _, folder = saved()
    (folder / "notes.txt").write_text("mine")
    adapter = load_adapter(folder)
    changed = {n: replace(f, scaling=2 * f.scaling) for n, f in adapter.factors.items()}
    before = sorted(p.name for p in folder.iterdir())
    save_adapter(folder, replace(adapter, factors=changed))
    assert sorted(p.name for p in folder.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["peft"]
    assert all(f.scaling == changed[n].scaling for n, f in load_adapter(folder).factors.items())


def test_a_save_that_fails_leaves_the_old_adapter(saved, tmp_path):
    _, folder = saved()
    adapter = load_adapter(folder)
    with pytest.raises(TypeError):
        save_adapter(folder, replace(adapter, config={**adapter.config, "task_type": object()}))
    assert load_adapter(folder).config == adapter.config
    assert [p.name for p in tmp_path.iterdir()] == ["peft"]
    with pytest.raises(AdapterError, match="is a file"):
        save_adapter(folder / CONFIG, adapter)
    with pytest.raises(AdapterError, match="cannot be written"):
        save_adapter(folder / CONFIG / "below", adapter)


def test_a_save_over_what_is_no_file_changes_nothing(saved, tmp_path):
    """New weights beside an old config, or the reverse, would load with a wrong scaling."""
    _, folder = saved()
    adapter = load_adapter(folder)
    other = replace(adapter, factors={n: replace(f, scaling=2 * f.scaling) for n, f in adapter.factors.items()})
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS / "in the way").mkdir(parents=True)
    config = (folder / CONFIG).read_bytes()
    for one in (adapter, other):
        with pytest.raises(AdapterError, match="cannot be written"):
            save_adapter(folder, one)
        assert (folder / CONFIG).read_bytes() == config
        assert [p.name for p in tmp_path.iterdir()] == ["peft"]


def test_what_cannot_be_saved_is_refused(saved, tmp_path):
    adapter = load_adapter(saved()[1])
    name, factors = next(iter(adapter.factors.items()))
    stranger = {"layers.9.q_proj": LoraFactors("layers.9.q_proj", factors.A, factors.B, 1.0)}
    broken = {name: replace(factors, B=torch.full_like(factors.B, float("inf")))}
    for wrong, words in ((stranger, r"first 'layers.9.q_proj'"), (broken, "NaN or infinite"), ({}, "no LoRA module")):
        with pytest.raises(AdapterError, match=words):
            save_adapter(tmp_path / "out", replace(adapter, factors=wrong))
    assert not (tmp_path / "out").exists()


def without_b(tensors):
    return {k: v for k, v in tensors.items() if "layers.0.self_attn.q_proj.lora_B" not in k}


def with_nan(tensors):
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][3, 1] = float("nan")


def with_magnitude(tensors):
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector"] = torch.ones(32)


def twice(tensors):
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    tensors[key.replace("base_model.model.model.", "model.")] = tensors[key].clone()


def of_integers(tensors):
    return {k: v.to(torch.int8) for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_b, "only one factor of module 'layers.0.self_attn.q_proj'"),
        (with_nan, "1 tensors with NaN or infinite values, first that of module 'layers.1.mlp.down_proj'"),
        (with_magnitude, "lora_magnitude_vector', which a plain LoRA"),
        (twice, "name one module"),
        (of_integers, "not floating point"),
        (lambda tensors: {"lm_head.weight": torch.ones(2)}, "no LoRA factor"),
    ],
)
def test_wrong_tensors_are_refused(saved, change, words):
    _, folder = saved()
    change_tensors(folder, change)
    with pytest.raises(AdapterError, match=words):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 8}, r"lora_A \(4, .*config says rank 8"),
        ({"r": None}, "rank None"),
        ({"lora_alpha": "16"}, "lora_alpha '16'"),
        ({"rank_pattern": {"down_proj": 2}}, r"'layers.0.mlp.down_proj' has lora_A \(4, .*config says rank 2"),
        ({"peft_type": "LOHA"}, "of type LOHA"),
        ({"peft_type": None}, "of type None"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ],
)
def test_wrong_configs_are_refused(saved, changes, words):
    _, folder = saved()
    change_config(folder, **changes)
    with pytest.raises(AdapterError, match=words):
        load_adapter(folder)


@pytest.mark.parametrize("size", [0, 4, 100, -1, -1000])
def test_truncated_weights_are_refused(saved, size):
    _, folder = saved()
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:size])
    with pytest.raises(AdapterError, match="corrupt or truncated"):
        load_adapter(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"LORA"'])
def test_corrupt_configs_are_refused(saved, text):
    _, folder = saved()
    (folder / CONFIG).write_text(text)
    with pytest.raises(AdapterError, match=CONFIG):
        load_adapter(folder)


def test_missing_and_pickled_files_are_refused(saved, tmp_path):
    _, folder = saved()
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"no adapter_model.safetensors. It has pickled weights"):
        load_adapter(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model.safetensors").touch()
    with pytest.raises(AdapterError, match=r"no adapter_config.json and no .*safetensors. It holds a whole"):
        load_adapter(folder)
    with pytest.raises(AdapterError, match="is a file"):
        load_adapter(folder / "model.safetensors")
    with pytest.raises(AdapterError, match="no such folder, and not a Hub id"):
        load_adapter(tmp_path / "absent")
    with pytest.raises(AdapterError, match="could not be fetched from the Hub at revision 'v2'"):
        load_adapter("no-such-org/no-such-adapter", revision="v2")


def test_hub_id_is_read_from_the_cache(saved, tmp_path, monkeypatch):
    model, folder = saved()
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--my-org--my-adapter"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    adapter, expected = load_adapter("my-org/my-adapter"), deltas(model)
    assert adapter.source == "my-org/my-adapter"
    assert all(torch.equal(delta(f), expected[n]) for n, f in adapter.factors.items())


def test_base_model_name_is_kept(saved):
    _, folder = saved()
    change_config(folder, base_model_name_or_path="my-org/my-model")
    assert load_adapter(folder).base_model == "my-org/my-model"


def test_gpt2_adapter_with_a_head_is_refused_until_its_config_is_clear(base, tmp_path):
    """PEFT writes one fan_in_fan_out, and the last module, lm_head, turns it off."""
    config = LoraConfig(target_modules=["c_attn", "lm_head"], fan_in_fan_out=True, init_lora_weights=False)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True but"):
        model = get_peft_model(base("gpt2"), config)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(AdapterError, match=r"lm_head and \['c_attn'\].*fan_in_fan_out to true"):
        load_adapter(tmp_path)
    change_config(tmp_path, fan_in_fan_out=True)
    expected = deltas(model)
    assert all(torch.equal(delta(f), expected[n]) for n, f in load_adapter(tmp_path).factors.items())
