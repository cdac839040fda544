"""A live model in four bits is what transformers makes of its checkpoint, and keeps LoRA factors as they are."""

import importlib.util

import pytest
import torch

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import quantised
from safemerge_callback.evaluation.quantised import check_quantised, quantise

installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
# On some processors its kernels take blocks of 64 by multiples of 32 only.
SIZES = {"hidden_size": 64, "intermediate_size": 64}
TOKENS = torch.arange(12)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@installed
def test_it_is_what_transformers_loads_in_four_bits(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = tiny_llama(**SIZES, attention_bias=True)
    model.save_pretrained(tmp_path)
    before = logits(model)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, dtype=torch.float32)
    assert quantise(model) == 14
    assert not torch.allclose(logits(model), before, atol=1e-3)
    assert torch.equal(logits(model), logits(loaded))
    assert type(model.lm_head) is torch.nn.Linear
    with pytest.raises(ConfigError, match="no linear layer to quantise"):
        quantise(model)


@installed
def test_an_adapter_stays_in_full_on_a_quantised_base(tiny_llama):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(**SIZES), lora)
    factors = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    whole = logits(model)
    assert quantise(model) == 14
    assert all(torch.equal(dict(model.named_parameters())[name], factor) for name, factor in factors.items())
    with model.disable_adapter():
        off = logits(model)
    # The adapter says as much as before, and the base a little otherwise.
    assert not torch.allclose(off, logits(model), atol=1e-3)
    assert not torch.equal(logits(model), whole)


def test_what_cannot_be_quantised_is_refused(monkeypatch, tiny_llama):
    with pytest.raises(ConfigError, match="'3bit'"):
        check_quantised("3bit")
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes: pip install 'safemerge-callback\[quantized\]'"):
        quantise(tiny_llama())


@installed
def test_a_device_on_which_it_cannot_is_said(monkeypatch, tiny_llama):
    import bitsandbytes

    def refuse(*_):
        raise AssertionError("no kernel\nmore")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", refuse)
    with pytest.raises(
        ConfigError, match=r"cannot quantise this model on cpu here \(no kernel\): ask on another --device"
    ):
        quantise(tiny_llama())
