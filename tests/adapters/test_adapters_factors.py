import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from safemerge_callback.adapters import LoraFactors, canonical_name
from safemerge_callback.errors import AdapterError
from safemerge_callback.live import base_weights, live_factors

SETTINGS = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 6, "use_rslora": True},
}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"],
    "qwen2": ["q_proj", "v_proj", "embed_tokens"],
    "gpt2": ["c_attn", "c_proj", "wte"],
}
PATTERNS = {
    "llama": {
        "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 3, "^lm_head": 5},
        "alpha_pattern": {"q_proj": 5, r"layers.0.*down_proj": 7},
    },
    "gpt2": {
        "rank_pattern": {r"h\.1\.attn\.c_attn": 3, r"^transformer\.h\.1\..*c_proj": 2},
        "alpha_pattern": {r"h\.0\..*c_proj": 7, "wte": 5},
    },
}
PATTERNS["qwen2"] = {
    "rank_pattern": {"v_proj": 2, "^model.embed_tokens": 3},
    "alpha_pattern": {"1.self_attn.q_proj": 5},
}


@pytest.fixture
def tiny(tiny_llama, tiny_qwen2):
    def gpt2():
        config = transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
        )
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config)

    return {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": gpt2}


@pytest.fixture
def adapted(tiny):
    def make(family="llama", **settings):
        settings = {"target_modules": TARGETS[family], "init_lora_weights": False, **settings}
        return get_peft_model(tiny[family](), LoraConfig(fan_in_fan_out=family == "gpt2", **settings))

    return make


def lora_layers(model, adapter="default"):
    found = {canonical_name(path): m for path, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    return {name: m for name, m in found.items() if adapter in {*m.lora_A, *m.lora_embedding_A}}


def delta(factors):
    product = (factors.B @ factors.A).detach()
    return (product.T if factors.transposed else product) * factors.scaling


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", TARGETS)
def test_factors_give_exactly_pefts_own_update(adapted, family, settings):
    patterns = PATTERNS[family] if settings == "patterns" else {}
    model = adapted(family, **SETTINGS[settings], **patterns)
    layers, factors = lora_layers(model), live_factors(model)
    assert set(factors) == set(layers)
    assert len(factors) >= 2 * len([t for t in TARGETS[family] if t[0] in "cqvd"])
    for name, layer in layers.items():
        assert torch.equal(delta(factors[name]), layer.get_delta_weight("default")), name
        assert factors[name].shape == (layer.out_features, layer.in_features)
    if settings == "patterns":
        assert len({f.rank for f in factors.values()}) > 1
        assert len({f.scaling for f in factors.values()}) > 2


def test_only_embeddings_and_conv1d_are_transposed(adapted):
    assert {n for n, f in live_factors(adapted("llama")).items() if f.transposed} == {"embed_tokens"}
    assert all(f.transposed for f in live_factors(adapted("gpt2")).values())


def test_factors_are_the_live_parameters(adapted):
    model = adapted("llama")
    parameters = {id(p) for p in model.parameters()}
    for factors in live_factors(model).values():
        assert {id(factors.A), id(factors.B)} <= parameters


def test_base_weights_are_the_checkpoints(tiny, adapted):
    for family in TARGETS:
        state = {canonical_name(k): v for k, v in tiny[family]().state_dict().items() if k.endswith(".weight")}
        model = adapted(family)
        weights = base_weights(model)
        assert set(weights) == set(live_factors(model))
        assert all(torch.equal(weight, state[name]) for name, weight in weights.items())


def test_base_weights_on_meta_are_left_out(adapted):
    model = adapted("llama")
    layer = lora_layers(model)["layers.0.self_attn.q_proj"]
    layer.base_layer.to("meta")
    assert set(live_factors(model)) - set(base_weights(model)) == {"layers.0.self_attn.q_proj"}


def test_quantised_base_gives_factors_but_no_base_weight():
    bnb = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4"), nn.Linear(32, 8)).to("cpu")
    model = get_peft_model(base, LoraConfig(target_modules=["0", "1"], r=4, init_lora_weights=False))
    factors = live_factors(model)
    assert {n: (f.shape, f.transposed) for n, f in factors.items()} == {"0": ((32, 64), False), "1": ((8, 32), False)}
    assert set(base_weights(model)) == {"1"}


def test_frozen_reference_adapter_is_ignored(adapted):
    model = adapted("llama", target_modules=["q_proj"])
    other = LoraConfig(target_modules=["q_proj", "k_proj"], r=2, init_lora_weights=False)
    model.add_adapter("ref", other)
    model.set_adapter("default")
    factors = live_factors(model)
    assert {n.rpartition(".")[2] for n in factors} == {"q_proj"}
    assert all(torch.equal(delta(f), lora_layers(model)[n].get_delta_weight("default")) for n, f in factors.items())
    named = live_factors(model, "ref")
    assert {f.rank for f in named.values()} == {2}
    assert {n.rpartition(".")[2] for n in named} == {"q_proj", "k_proj"}
    assert not any(f.A.requires_grad for f in named.values())


def test_two_active_adapters_are_refused_unless_one_is_named(adapted):
    model = adapted("llama", target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], r=2))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match=r"2 LoRA adapters are active \(\['default', 'second'\]\)"):
        live_factors(model)
    assert {f.rank for f in live_factors(model, "second").values()} == {2}


def test_unknown_adapter_suggests_the_nearest(adapted):
    with pytest.raises(
        AdapterError, match=r"no LoRA adapter 'defalt'; choose one of \['default'\]; did you mean 'default'"
    ):
        live_factors(adapted("llama"), "defalt")


def test_model_without_lora_is_refused(tiny):
    with pytest.raises(AdapterError, match="no LoRA module"):
        live_factors(tiny["llama"]())


def test_wrapped_and_unwrapped_models_have_the_same_names(adapted):
    model = adapted("llama")
    assert list(live_factors(nn.DataParallel(model))) == list(live_factors(model))
    assert list(live_factors(torch.compile(model, backend="eager"))) == list(live_factors(model))


def test_two_modules_of_one_name_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.ModuleDict({"fc": nn.Linear(4, 4)})
            self.fc = nn.Linear(4, 4)

    model = get_peft_model(Twice(), LoraConfig(target_modules=["fc"]))
    with pytest.raises(AdapterError, match="share the name 'fc'"):
        live_factors(model)


@pytest.mark.skipif(Version(peft.__version__) < Version("0.19"), reason="peft tied no factors before 0.19")
def test_tied_factors_are_refused(tiny_gemma):
    config = LoraConfig(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    with pytest.raises(AdapterError, match="'embed_tokens' and 'lm_head' share one tensor"):
        live_factors(get_peft_model(tiny_gemma(), config))


def test_factors_merged_into_the_base_are_refused(adapted):
    model = adapted("llama")
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        live_factors(model)
    model.unmerge_adapter()
    assert live_factors(model)


def test_partitioned_and_offloaded_factors_are_refused(adapted):
    model = adapted("llama")
    weight = lora_layers(model)["layers.0.self_attn.q_proj"].lora_A["default"].weight
    full = weight.data
    weight.data = torch.empty(0)
    with pytest.raises(AdapterError, match=r"lora_A is \(0,\).*ZeRO-3"):
        live_factors(model)
    weight.data = full
    model.base_model.model.model.layers[1].to("meta")
    with pytest.raises(AdapterError, match="offloaded"):
        live_factors(model)


@pytest.mark.parametrize("unit", [0.25, -3.0, 1.5])
@pytest.mark.parametrize("scaling", [1.5, -0.5, 0.0])
def test_low_rank_in_another_unit_keeps_the_update(scaling, unit):
    factors = LoraFactors("m", torch.randn(3, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64), scaling)
    low = factors.low_rank(unit)
    torch.testing.assert_close(unit * low.B @ low.A, scaling * factors.B @ factors.A)
    if scaling == unit:
        assert torch.equal(low.A, factors.A)
        assert torch.equal(low.B, factors.B)
    else:
        torch.testing.assert_close(low.A, abs(scaling / unit) ** 0.5 * factors.A)


def test_low_rank_in_the_own_unit_is_bit_identical_and_another_is_widened():
    factors = LoraFactors("m", torch.randn(3, 6).bfloat16(), torch.randn(5, 3).bfloat16(), 1 / 3)
    for low in (factors.low_rank(), factors.low_rank(1 / 3)):
        assert low.A.data_ptr() == factors.A.data_ptr()
        assert low.B.data_ptr() == factors.B.data_ptr()
    assert factors.low_rank(2.0).A.dtype == torch.float32
    for unit in (0.0, float("nan"), float("inf")):
        with pytest.raises(AdapterError, match="cannot be divided"):
            factors.low_rank(unit)


def test_injected_adapter_without_a_peft_model_works(tiny):
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], r=4), tiny["llama"]())
    assert not isinstance(model, PeftModel)
    assert list(live_factors(model)) == ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
