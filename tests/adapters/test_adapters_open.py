"""An adapter read at each access and written module by module: against the one held whole."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from safemerge_callback.adapters import load_adapter, open_adapter, save_adapter
from safemerge_callback.adapters.checkpoint import save_changed
from safemerge_callback.errors import AdapterError
from safemerge_callback.ops import LowRank


@pytest.fixture
def folder(tmp_path, tiny_llama):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}, modules_to_save=["lm_head"]
    )
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_opened_adapter_is_the_loaded_one(folder):
    opened, loaded = open_adapter(folder), load_adapter(folder)
    assert list(opened.factors) == list(loaded.factors)
    assert opened.keys == loaded.keys
    assert opened.config == loaded.config
    assert "layers.0.self_attn.q_proj" in opened.factors
    assert "lm_head" not in opened.factors
    with pytest.raises(KeyError):
        opened.factors["lm_head"]
    for name, module in loaded.factors.items():
        again = opened.factors[name]
        assert again is not opened.factors[name]
        assert torch.equal(again.A, module.A)
        assert torch.equal(again.B, module.B)
        assert (again.scaling, again.transposed) == (module.scaling, module.transposed)
    assert {key: tensor.shape for key, tensor in opened.extra.items()} == {
        key: tensor.shape for key, tensor in loaded.extra.items()
    }


@pytest.mark.parametrize("more", [0, 3])
def test_what_is_written_in_parts_is_what_is_written_whole(folder, tmp_path, more):
    """`more` rows are added to the changed modules, as `cat` does."""
    from dataclasses import replace

    opened, loaded = open_adapter(folder), load_adapter(folder)
    names = list(loaded.factors)[1:3]
    new = {}
    for name in names:
        module = loaded.factors[name]
        rank = module.rank + more
        new[name] = LowRank(torch.randn(rank, module.d_in), torch.randn(module.d_out, rank))
    factors = {**loaded.factors, **{n: replace(loaded.factors[n], A=a, B=b) for n, (a, b) in new.items()}}
    save_adapter(tmp_path / "whole", replace(loaded, factors=factors))
    ranks = {name: update.A.shape[0] for name, update in new.items()}
    save_changed(tmp_path / "parts", opened, ranks, reversed(new.items()))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_values_that_are_not_finite_are_refused_on_the_way_in_and_out(folder, tmp_path):
    opened = open_adapter(folder)
    name = next(iter(opened.factors))
    module = opened.factors[name]
    broken = LowRank(module.A * torch.inf, module.B)
    with pytest.raises(AdapterError, match="NaN or infinite values"):
        save_changed(tmp_path / "x", opened, {name: module.rank}, [(name, broken)])
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[opened.keys[name].B][0, 0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="NaN or infinite values"):
        open_adapter(folder)


@pytest.mark.parametrize("spoil", ["cut", "rank", "lone"])
def test_what_loading_refuses_opening_refuses_alike(folder, spoil):
    weights = folder / "adapter_model.safetensors"
    if spoil == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif spoil == "rank":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    else:
        tensors = load_file(weights)
        save_file(
            {k: v for k, v in tensors.items() if not k.endswith("layers.0.self_attn.q_proj.lora_A.weight")}, weights
        )
    with pytest.raises(AdapterError) as opened:
        open_adapter(folder)
    with pytest.raises(AdapterError) as loaded:
        load_adapter(folder)
    assert str(opened.value) == str(loaded.value)
