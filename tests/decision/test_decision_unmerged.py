"""What a merge leaves out of a safety adapter is told by name; what is only the base model's is not."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from safemerge_callback import SafeMergeCallback, apply_safemerge
from safemerge_callback.adapters import load_adapter
from safemerge_callback.decision.unmerged import base_tensors, unmerged, warning_of
from safemerge_callback.offline import merge_adapters, sweep_adapters
from safemerge_callback.subspace import Subspace, build_subspace
from tests.support.versions import above_bound

TARGETS = ["q_proj", "v_proj"]
# What a safety adapter is trained with beside a LoRA on q and v, and what is told of it; all but the head not as given.
LEFT = {
    "head": ({"modules_to_save": ["lm_head"]}, "trained tensors of lm_head"),
    "norms": ({"modules_to_save": ["input_layernorm"]}, "trained tensors of layers.0.input_layernorm, layers.1"),
    "biases": ({"bias": "lora_only"}, "trained tensors of layers.0.self_attn.q_proj.bias, layers.0.self_attn"),
    "rows": ({"trainable_token_indices": [4, 5, 6]}, "trained rows of tokens in embed_tokens (3)"),
    "modules": (
        {"target_modules": [*TARGETS, "up_proj"]},
        "the updates of layers.0.mlp.up_proj, layers.1.mlp.up_proj, modules that the fine-tuned adapter lacks",
    ),
    "both": (
        {"modules_to_save": ["embed_tokens"], "target_modules": "all-linear"},
        "trained tensors of embed_tokens; the updates of layers.0",
    ),
}  # fmt: skip
# What PEFT saves of the base model, or was to be trained and was not.
SAME = {
    "nothing": {},
    "saved, not trained": {"modules_to_save": ["lm_head"]},
    "rows, not trained": {"trainable_token_indices": [4]},
    "biases, not trained": {"bias": "all"},
}


@pytest.fixture
def world(tmp_path, tiny_qwen2):
    """A folder with `chat`, `base`, the subspace `s`, and the adapter `task`."""
    for name, seed in (("base", 2), ("chat", 1)):
        tiny_qwen2(seed=seed).save_pretrained(tmp_path / name)
    build_subspace(tmp_path / "s", aligned=tmp_path / "chat", unaligned=tmp_path / "base", progress=False)
    adapted(tmp_path, tiny_qwen2).save_pretrained(tmp_path / "task")
    return tmp_path


def adapted(world, make, trained=False, **lora):
    if lora.get("bias") == "lora_only":
        above_bound("peft", "biases of adapted modules are trained and saved")
    config = LoraConfig(**{"target_modules": TARGETS, "init_lora_weights": False, **lora})
    model = get_peft_model(make(seed=1), config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if trained and value.requires_grad and "lora_" not in key:
                value.add_(0.5)
    return model


def merged(world, **knobs):
    return merge_adapters(world / "task", world / "safety", world / "s", world / "out", gate="all", **knobs)


@pytest.mark.parametrize("name", LEFT)
def test_it_is_told_in_the_warning_the_card_and_the_journal(world, tiny_qwen2, name):
    lora, words = LEFT[name]
    adapted(world, tiny_qwen2, trained=True, **lora).save_pretrained(world / "safety")
    with pytest.warns(UserWarning, match="safemerge: left out are of safety adapter .*safety' ") as told:
        merged(world)
    assert len(told) == 1
    assert words in str(told[0].message)
    assert "take the rest over by hand" in str(told[0].message)
    assert words in (world / "out" / "README.md").read_text().replace("\\", "")
    start = json.loads((world / "out" / "safemerge.jsonl").read_text().splitlines()[0])
    assert start["config"]["left_out"].startswith(f"safety: {words}"[:40])


@pytest.mark.parametrize("name", SAME)
def test_what_is_equal_to_the_base_at_hand_is_not_told(world, tiny_qwen2, name):
    adapted(world, tiny_qwen2, **SAME[name]).save_pretrained(world / "safety")
    merged(world, bake=world / "chat")
    assert "left out" not in (world / "out" / "README.md").read_text()


def test_copies_that_peft_saves_of_its_own_accord_are_not_told(world, tiny_qwen2):
    """An adapted embedding is saved with its base weight; both adapters hold it."""
    for name in ("task", "safety"):
        model = adapted(world, tiny_qwen2, target_modules=["embed_tokens", *TARGETS])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
            model.save_pretrained(world / name)
    build_subspace(
        world / "s", aligned=world / "chat", unaligned=world / "base", target_modules=["embed_tokens", *TARGETS],
        progress=False,
    )  # fmt: skip
    assert "embed_tokens" in load_adapter(world / "safety").factors
    merged(world)
    assert not unmerged(load_adapter(world / "safety"), Subspace.load(world / "s").modules, lambda name: None)


@pytest.mark.parametrize("name", LEFT)
def test_a_live_model_tells_it_against_its_own_weights(world, tiny_qwen2, name):
    lora, words = LEFT[name]
    adapted(world, tiny_qwen2, trained=True, **lora).save_pretrained(world / "safety")
    with pytest.warns(UserWarning, match="left out are of safety adapter") as told:
        apply_safemerge(adapted(world, tiny_qwen2), world / "safety", world / "s", gate="all")
    assert any(words in str(one.message) for one in told)
    adapted(world, tiny_qwen2, **{**lora, "target_modules": TARGETS}).save_pretrained(world / "same")
    apply_safemerge(adapted(world, tiny_qwen2), world / "same", world / "s", gate="all")


def test_a_sweep_tells_it(world, tiny_qwen2):
    adapted(world, tiny_qwen2, trained=True, **LEFT["head"][0]).save_pretrained(world / "safety")
    from safemerge_callback.decision import Gate

    with pytest.warns(UserWarning, match="left out are of safety adapter .* trained tensors of lm_head"):
        sweep_adapters(world / "task", world / "safety", world / "s", gates=[Gate("all")], weights=[(0.8, 0.2)])


@pytest.mark.parametrize("name", ["head", "rows"])
def test_a_training_tells_it_before_its_first_step(world, tiny_qwen2, name):
    from transformers import Trainer, TrainingArguments

    adapted(world, tiny_qwen2, trained=True, **LEFT[name][0]).save_pretrained(world / "safety")
    guard = SafeMergeCallback(subspace=str(world / "s"), safety_adapter=str(world / "safety"), every=1, quiet=True)
    args = TrainingArguments(
        str(world / "run"), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 4
    trainer = Trainer(adapted(world, tiny_qwen2), args, train_dataset=rows, callbacks=[guard])
    with pytest.warns(UserWarning, match=r"left out are of safety adapter .*trained (tensors|rows)"):
        trainer.train()
    entries = [json.loads(line) for line in (world / "run" / "safemerge.jsonl").read_text().splitlines()]
    assert entries[0]["left_out"] == {"safety": LEFT[name][1]}


@pytest.mark.parametrize("name", ["head", "biases", "rows"])
def test_an_alignment_adapter_tells_it_and_the_subspace_notes_it(world, tiny_qwen2, name):
    lora, words = LEFT[name]
    adapted(world, tiny_qwen2, trained=True, **lora).save_pretrained(world / "safety")
    with pytest.warns(UserWarning, match="left out of alignment adapter .*safety' are trained"):
        made = build_subspace(world / "v", alignment_adapter=world / "safety", progress=False)
    assert made.unaligned["left_out"][0].startswith(words)
    adapted(world, tiny_qwen2, **lora).save_pretrained(world / "same")
    if name != "biases":  # a checkpoint's reader has matrices only
        plain = build_subspace(world / "w", alignment_adapter=world / "same", aligned=world / "chat", progress=False)
        assert "left_out" not in plain.unaligned


def test_base_tensors_are_those_without_the_adapters(tiny_qwen2):
    model = adapted(None, tiny_qwen2, trained=True, modules_to_save=["lm_head"], trainable_token_indices=[4])
    plain, found = tiny_qwen2(seed=1), base_tensors(model)
    for name, key in (("lm_head", "lm_head"), ("embed_tokens", "model.embed_tokens")):
        assert torch.equal(found(name), plain.get_parameter(f"{key}.weight"))
    assert torch.equal(found("layers.1.self_attn.q_proj"), plain.model.layers[1].self_attn.q_proj.weight)
    assert found("layers.9.self_attn.q_proj") is None


def test_nothing_left_out_is_no_warning():
    assert warning_of({}) is None
    assert warning_of({"org/safety": ""}) is None
