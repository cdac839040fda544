"""A preset is what its source does: a run with it ends where a merge after a run without it does."""

import pytest
import torch
from safetensors.torch import load_file

from safemerge_callback import SafeMergeCallback, SafeMergeConfig, merge_adapters
from safemerge_callback.errors import ConfigError
from safemerge_callback.training.config.shorthands import PRESETS

AFTER = {
    "safemerge": {"gate": "threshold", "threshold": 0.35, "weights": (0.8, 0.2), "space": "factor"},
    "safelora": {"gate": "num_layers", "method": "project"},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_training_with_a_preset_is_training_and_then_the_papers_merge(world, tmp_path, preset):
    # This model has four modules, all of them well above 0.35.
    few = {"safelora": {"num_layers": 2}, "safemerge": {"threshold": 1.0}}[preset]
    adapter = world.safety if preset == "safemerge" else None
    guard = SafeMergeCallback(preset=preset, subspace=world.subspace, safety_adapter=adapter, **few)
    for name, callbacks in (("guarded", [guard]), ("plain", [])):
        # Space factor needs the safety adapter's rank.
        trainer = world.trainer(tmp_path / name, *callbacks, model=world.model(r=3, lora_alpha=6))
        trainer.train()
        trainer.save_model()
    merge_adapters(tmp_path / "plain", adapter, world.subspace, tmp_path / "after", **{**AFTER[preset], **few})
    merged, expected, plain = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("guarded", "after", "plain")
    )
    assert any(not torch.equal(expected[key], plain[key]) for key in plain)
    for key, value in merged.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)


def test_settings_beside_a_preset_go_before_its_own():
    config = SafeMergeConfig.from_dict({"preset": "safemerge", "subspace": "s", "safety_adapter": "a", "every": 7})
    assert (config.every, config.threshold, config.space) == (7, 0.35, "factor")
    exact = {"preset": "safemerge", "subspace": "s", "safety_adapter": "a", "combination_type": "svd"}
    assert SafeMergeConfig.from_dict(exact).space == "delta"
    config.weights[0] = 0.0
    assert PRESETS["safemerge"]["weights"] == [0.8, 0.2]


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"preset 'safemarge' is unknown.*did you mean 'safemerge'"):
        SafeMergeConfig.from_dict({"preset": "safemarge", "subspace": "s"})
