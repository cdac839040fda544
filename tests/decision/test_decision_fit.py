"""A safety adapter that changes nothing is refused where it would be merged in, in training and on files."""

import json
import warnings

import pytest
import torch

from safemerge_callback import SafeMergeCallback, build_subspace, merge_adapters, sweep_adapters
from safemerge_callback.adapters import load_adapter
from safemerge_callback.decision import Gate
from safemerge_callback.decision.fit import check_not_zero
from safemerge_callback.errors import AdapterError

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def saved(tmp_path, tiny_llama):
    """What saves an adapter of which one half, or none, was ever trained, by its name; and a subspace beside."""
    from peft import LoraConfig, get_peft_model

    tiny_llama(seed=1).save_pretrained(tmp_path / "aligned")
    tiny_llama(seed=2).save_pretrained(tmp_path / "unaligned")
    build_subspace(
        tmp_path / "s.safetensors", aligned=tmp_path / "aligned", unaligned=tmp_path / "unaligned", progress=False
    )

    def make(name, drawn=("lora_A", "lora_B"), **config):
        model = get_peft_model(tiny_llama(seed=1), LoraConfig(r=2, target_modules=TARGETS))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn_like(parameter) * any(half in key for half in drawn))
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return str(tmp_path / name)

    return make


ZERO = {
    "lora_alpha 0": ({"lora_alpha": 0}, "has lora_alpha 0 in its config: .*Write the lora_alpha that it was trained"),
    "rsLoRA": ({"lora_alpha": 0, "use_rslora": True}, "has lora_alpha 0"),
    "by pattern": ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 0, "v_proj": 0}}, "has lora_alpha 0"),
    "fresh": ({"drawn": ("lora_A",)}, "was never trained: its update is zero in all 4 modules.*Train it"),
    "no A": ({"drawn": ("lora_B",)}, "was never trained"),
}


@pytest.mark.parametrize(("how", "words"), ZERO.values(), ids=ZERO)
def test_it_is_refused_by_every_verb(saved, tmp_path, tiny_llama, how, words):
    task, safety = saved("task"), saved("safety", **how)
    subspace = tmp_path / "s.safetensors"
    with pytest.raises(AdapterError, match=words):
        merge_adapters(task, safety, subspace, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match=words):
        sweep_adapters(task, safety, subspace, gates=[Gate("all")])
    with pytest.raises(AdapterError, match=words):
        trained(tmp_path, tiny_llama, subspace, safety)


def trained(tmp_path, tiny_llama, subspace, safety):
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(tiny_llama(seed=1), LoraConfig(r=2, target_modules=TARGETS))
    args = TrainingArguments(tmp_path / "run", max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 4
    guard = SafeMergeCallback(subspace=str(subspace), safety_adapter=safety, every=1)
    Trainer(model, args, train_dataset=rows, callbacks=[guard]).train()


@pytest.mark.parametrize("how", [{}, {"alpha_pattern": {"q_proj": 0}}, {"lora_alpha": -4}])
def test_one_that_changes_a_module_is_taken(saved, how):
    adapter = load_adapter(saved("safety", **how))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_not_zero(adapter, list(adapter.factors))
        check_not_zero(adapter, [])
