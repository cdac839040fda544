"""A merge as a new adapter on a PEFT model: against the same merge made on disk, and against what stays."""

import copy

import pytest
import torch

from safemerge_callback import apply_safelora, apply_safemerge
from safemerge_callback.adapters import load_adapter
from safemerge_callback.errors import AdapterError, ConfigError, PlanError, SafeMergeError, SubspaceError
from safemerge_callback.live import live_factors
from safemerge_callback.offline import measure_adapter, merge_adapters

TOKENS = torch.arange(1, 17)[None]


def loaded(folder, **how):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(folder.parent / "aligned", dtype=how.pop("dtype", torch.float32))
    return PeftModel.from_pretrained(base, folder, **how).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def dense(factors):
    return {n: f.scaling * f.B.detach().double() @ f.A.detach().double() for n, f in factors.items()}


def assert_equal(found, wanted, tolerance=1e-6):
    assert set(found) == set(wanted)
    for name, update in found.items():
        assert float((update - wanted[name]).norm() / wanted[name].norm()) < tolerance, name


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    ],
)
@pytest.mark.parametrize(
    "knobs", [{}, {"method": "cat", "weights": (0.7, 0.4)}, {"method": "ties", "density": 0.5, "seed": 3}]
)
def test_the_new_adapter_is_the_merge_made_on_disk(world, tiny_llama, save_lora, tmp_path, lora, knobs):
    save_lora(tiny_llama, world / "task", seed=5, **lora)
    knobs = {"gate": "num_layers", "num_layers": 4, **knobs}
    model = loaded(world / "task")
    before, old = logits(model), copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    plan = apply_safemerge(model, world / "safety", world / "s.safetensors", **knobs)
    assert torch.equal(torch.get_rng_state(), state)
    on_disk = merge_adapters(world / "task", world / "safety", world / "s.safetensors", world / "out", **knobs)
    assert set(plan.selected) == set(on_disk.selected)
    new = dense(live_factors(model, "safemerge"))
    assert_equal(new, dense(load_adapter(world / "out").factors))
    # Active, frozen, and the old adapter and the base as they were.
    assert model.active_adapters == ["safemerge"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if "safemerge" in n)
    assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items() if name in old)
    task, merged = live_factors(model, "default"), live_factors(model, "safemerge")
    for name in set(task) - set(plan.selected):
        assert torch.equal(merged[name].A, task[name].A)
        assert torch.equal(merged[name].B, task[name].B)
    after = logits(model)
    assert float((after - before).abs().max()) > 1e-3
    torch.testing.assert_close(after, logits(loaded(world / "out")), rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)
    # Saved by PEFT and loaded again, alone.
    model.save_pretrained(tmp_path / "saved", selected_adapters=["safemerge"])
    (tmp_path / "saved" / "aligned").symlink_to(world / "aligned")
    again = loaded(tmp_path / "saved" / "safemerge")
    torch.testing.assert_close(logits(again), after, rtol=1e-5, atol=1e-6)
    assert_equal(dense(load_adapter(tmp_path / "saved" / "safemerge").factors), new, 1e-12)


def test_safelora_projects_as_its_paper_says(world):
    from safetensors.torch import load_file

    cosines = sorted(r.cosine for r in measure_adapter(world / "task", world / "s.safetensors").values())
    model = loaded(world / "task")
    by_count = apply_safelora(model, world / "s.safetensors", num_layers=3)
    assert len(by_count.selected) == 3
    model.set_adapter("default")
    by_cosine = apply_safelora(model, world / "s.safetensors", threshold=cosines[3] + 1e-9, new_adapter_name="other")
    assert len(by_cosine.selected) == 4
    aligned, unaligned = (load_file(world / part / "model.safetensors") for part in ("aligned", "unaligned"))
    old, new = dense(live_factors(model, "default")), dense(live_factors(model, "safelora"))
    for name in old:
        key = f"model.{name}.weight"
        V = aligned[key].double() - unaligned[key].double()
        C = V @ V.T / V.norm()
        wanted = C @ old[name] if name in by_count.selected else old[name]
        assert float((new[name] - wanted).norm() / wanted.norm()) < 1e-5
    with pytest.raises(ConfigError, match="exclude each other"):
        apply_safelora(model, world / "s.safetensors", threshold=0.5, num_layers=3, new_adapter_name="third")


def test_half_precision_factors_stay_so(world):
    model = loaded(world / "task", dtype=torch.bfloat16, autocast_adapter_dtype=False)
    old = live_factors(model, "default")
    assert {f.A.dtype for f in old.values()} == {torch.bfloat16}
    plan = apply_safemerge(model, world / "safety", world / "s.safetensors", gate="all", weights=(0.5, 0.5))
    new = live_factors(model, "safemerge")
    assert {f.A.dtype for f in new.values()} | {f.B.dtype for f in new.values()} == {torch.bfloat16}
    assert not torch.equal(new[plan.selected[0]].B, old[plan.selected[0]].B)
    assert logits(model).isfinite().all()


def test_an_adapter_of_the_model_is_merged_by_name(world):
    model = loaded(world / "task")
    model.load_adapter(world / "safety", "safe")
    model.load_adapter(world / "other", "third")
    knobs = {"gate": "all", "weights": (0.6, 0.3, 0.1)}
    apply_safemerge(model, ["safe", world / "other"], world / "s.safetensors", adapter_name="default", **knobs)
    merge_adapters(world / "task", [world / "safety", world / "other"], world / "s.safetensors", world / "out", **knobs)
    assert_equal(dense(live_factors(model, "safemerge")), dense(load_adapter(world / "out").factors))


def test_a_trained_head_comes_along(world, tiny_llama):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(seed=1), config).eval()
    head = model.base_model.model.lm_head.modules_to_save
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    apply_safemerge(model, world / "safety", world / "s.safetensors", gate="all")
    assert torch.equal(head["safemerge"].weight, head["default"].weight)
    with pytest.raises(ConfigError, match="fits none"):
        apply_safemerge(
            model, world / "safety", world / "s.safetensors", adapter_name="default", new_adapter_name="x",
            module_weights={"k_proj": (0.5, 0.5)},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("error", "match", "safety", "knobs"),
    [
        (ConfigError, "'default' is taken", "safety", {"new_adapter_name": "default"}),
        (ConfigError, "without dots", "safety", {"new_adapter_name": "a.b"}),
        (ConfigError, "did you mean 'linear'", "safety", {"method": "linaer"}),
        (ConfigError, "merges nothing", "safety", {"gate": "watch"}),
        (ConfigError, "is unknown", "safety", {"tresh": 1}),
        (PlanError, "'linear' needs a safety adapter", None, {"weights": (0.8, 0.2)}),
        (PlanError, "'reference' needs", None, {"method": "project", "gate": "reference"}),
        (ConfigError, "average of a run", "safety", {"method": "ema"}),
        (PlanError, "2 safety adapters were given", ["safety", "other"], {"weights": (0.5, 0.5)}),
        (AdapterError, "did you mean 'default'", "safety", {"adapter_name": "defualt"}),
        (AdapterError, "no such folder", "nowhere/at/all", {}),
        (AdapterError, "lacks 2 of 6", "partial", {"gate": "all"}),
    ],
)
def test_refusals_are_value_errors_and_add_nothing(world, tiny_llama, save_lora, error, match, safety, knobs):
    save_lora(tiny_llama, world / "partial", 7, ["q_proj", "down_proj"])
    model = loaded(world / "task")
    before = {name for name, _ in model.named_parameters()}
    paths = [world / one for one in safety] if isinstance(safety, list) else safety and world / safety
    with pytest.raises(error, match=match) as raised:
        apply_safemerge(model, paths, world / "s.safetensors", **knobs)
    assert isinstance(raised.value, (SafeMergeError, ValueError))
    assert {name for name, _ in model.named_parameters()} == before
    assert list(model.peft_config) == ["default"]


def test_models_that_do_not_fit(world, tiny_llama):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(AdapterError, match="not a PeftModel"):
        apply_safemerge(tiny_llama(), world / "safety", world / "s.safetensors")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    with pytest.raises(SubspaceError, match="not the aligned checkpoint"):
        apply_safemerge(get_peft_model(tiny_llama(seed=9), config), world / "safety", world / "s.safetensors")
    biased = get_peft_model(tiny_llama(seed=1), LoraConfig(r=4, target_modules=["q_proj"], bias="all"))
    with pytest.raises(AdapterError, match="bias='all'"):
        apply_safemerge(biased, world / "safety", world / "s.safetensors")
    merged = loaded(world / "task")
    merged.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        apply_safemerge(merged, world / "safety", world / "s.safetensors")


def test_a_fault_takes_the_new_adapter_off_again(world, monkeypatch):
    model = loaded(world / "task")
    before = logits(model)

    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("safemerge_callback.offline.peft_model._copy_rest", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        apply_safemerge(model, world / "safety", world / "s.safetensors", gate="all")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)
