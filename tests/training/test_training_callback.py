import copy
import gc
import math
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

from safemerge_callback import Subspace, build_subspace, live_factors, measure
from safemerge_callback.errors import AdapterError, ConfigError, JournalError, SafeMergeError, SubspaceError
from safemerge_callback.training import SafeMergeCallback, SafeMergeConfig
from tests.support.metrics import EVERY_CHECK

SAFETY_SCALING = 2.0  # alpha 6 over rank 3
LIVE_SCALING = 2.0  # alpha 8 over rank 4


def safety_updates(world, runs):
    return runs.updates(runs.saved_weights(world.safety), SAFETY_SCALING)


# --- making one -------------------------------------------------------------------------------------------------------


def test_the_constructor_opens_nothing_and_imports_no_tracker():
    code = (
        "import sys; from safemerge_callback import SafeMergeCallback;"
        "SafeMergeCallback(subspace='/nowhere/at/all', safety_adapter='/nowhere/either');"
        "loaded = {'wandb', 'mlflow', 'trackio', 'tensorboard'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_keywords_and_config_make_the_same_callback(world):
    config = SafeMergeConfig.from_dict(world.knobs())
    assert SafeMergeCallback(config).config == SafeMergeCallback(**world.knobs()).config
    with pytest.raises(ConfigError, match="did you mean 'threshold'"):
        world.guard(treshold=0.5)
    with pytest.raises(ConfigError, match="beside a config"):
        SafeMergeCallback(config, every=3)
    guard = SafeMergeCallback(config)
    assert (guard.seconds, guard.share) == (0.0, 0.0)


def test_attaching_hands_the_trainer_over_and_adds_the_callback_once(world, runs, tmp_path):
    guard = world.guard(every=2)
    trainer = world.trainer(tmp_path / "added", max_steps=2)
    assert guard.attach(trainer) is guard
    guard.attach(trainer)
    assert [c for c in trainer.callback_handler.callbacks if c is guard] == [guard]
    trainer.train()
    assert [e["step"] for e in runs.entries(tmp_path / "added", "merge")] == [2]
    there = world.guard(every=2)
    given = world.trainer(tmp_path / "given", there, max_steps=2)
    assert there.attach(given).trainer is given
    assert [c for c in given.callback_handler.callbacks if c is there] == [there]
    with pytest.raises(ConfigError, match="attach was given <class 'dict'>: give the Trainer"):
        guard.attach(dict)


def test_what_it_is_attached_to_stays_with_the_original(world, tmp_path):
    """A copy knows no trainer, another trainer than the attached one is not taken for it, and one may end."""
    guard = world.guard(every=0)
    guard.attach(world.trainer(tmp_path / "gone", max_steps=1))
    gc.collect()
    assert guard.trainer is None
    trainer = world.trainer(tmp_path, guard, max_steps=1)
    guard.attach(trainer)
    assert copy.deepcopy(guard).trainer is None
    assert pickle.loads(pickle.dumps(guard)).trainer is None
    world.trainer(tmp_path / "other", guard, max_steps=1).train()
    assert guard.trainer is trainer


# --- everything that can be wrong is told before the first step -------------------------------------------------------


def refused(world, runs, tmp_path, guard, error, match, model=None):
    recorder = runs.Recorder()
    trainer = world.trainer(tmp_path / "out", recorder, guard, model=model)
    with pytest.raises(error, match=match) as caught:
        trainer.train()
    assert isinstance(caught.value, SafeMergeError)
    assert trainer.state.global_step == 0
    assert recorder.steps == {}


def test_a_model_without_lora(world, runs, tmp_path):
    refused(world, runs, tmp_path, world.guard(), AdapterError, "LoRA", model=copy.deepcopy(world.aligned))


def test_an_adapter_name_that_is_not_there(world, runs, tmp_path):
    refused(world, runs, tmp_path, world.guard(adapter_name="task"), AdapterError, "task")


def test_dora(world, runs, tmp_path):
    refused(world, runs, tmp_path, world.guard(), AdapterError, "DoRA", model=world.model(use_dora=True))


def test_a_subspace_file_that_is_missing_or_broken(world, runs, tmp_path):
    absent = str(tmp_path / "absent.safetensors")
    refused(world, runs, tmp_path, world.guard(subspace=absent), SubspaceError, "absent")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not a header")
    refused(world, runs, tmp_path, world.guard(subspace=str(broken)), SubspaceError, "broken")


def test_a_subspace_that_lacks_modules(world, runs, tmp_path):
    part = tmp_path / "part.safetensors"
    source = {"aligned": world.folder / "aligned", "unaligned": world.folder / "unaligned"}
    build_subspace(part, **source, target_modules=["q_proj"], progress=False)
    refused(world, runs, tmp_path, world.guard(subspace=str(part)), SubspaceError, "v_proj")


def test_a_subspace_of_another_model(world, runs, tmp_path, tiny_llama):
    for seed in (7, 8):
        tiny_llama(seed, hidden_size=16).save_pretrained(tmp_path / str(seed))
    other = tmp_path / "other.safetensors"
    build_subspace(other, aligned=tmp_path / "7", unaligned=tmp_path / "8", progress=False)
    refused(world, runs, tmp_path, world.guard(subspace=str(other)), SubspaceError, "16")


def test_a_base_model_that_is_not_the_aligned_one(world, runs, tmp_path):
    model = world.model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" in name:
                parameter.mul_(1.5)
    refused(world, runs, tmp_path, world.guard(), SubspaceError, "aligned", model=model)


def test_a_safety_adapter_that_is_missing_or_lacks_modules(world, runs, tmp_path):
    refused(world, runs, tmp_path, world.guard(safety_adapter=str(tmp_path / "gone")), AdapterError, "gone")
    model = world.model(targets=["q_proj", "k_proj"])
    refused(world, runs, tmp_path, world.guard(), AdapterError, "k_proj", model=model)


def test_ranks_that_factor_space_cannot_add(world, runs, tmp_path):
    refused(world, runs, tmp_path, world.guard(space="factor"), SafeMergeError, "rank")
    world.trainer(tmp_path / "aligned", world.guard(space="aligned_factor", gate="all", every=1), max_steps=2).train()
    assert {entry["space"] for entry in runs.entries(tmp_path / "aligned", "merge")} == {"aligned_factor"}


def test_more_layers_than_there_are(world, runs, tmp_path):
    guard = world.guard(gate="num_layers", num_layers=99)
    refused(world, runs, tmp_path, guard, ConfigError, "num_layers=99 is more than the 4")


def test_a_journal_that_cannot_be_written(world, runs, tmp_path):
    (tmp_path / "file").write_text("in the way")
    guard = world.guard(journal=str(tmp_path / "file" / "safemerge.jsonl"))
    refused(world, runs, tmp_path, guard, JournalError, "cannot be")


def test_a_file_that_is_no_journal_is_left_alone(world, runs, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes\nof the day\n")
    refused(world, runs, tmp_path, world.guard(journal=str(notes)), JournalError, "line 1")
    assert notes.read_text() == "my notes\nof the day\n"


# --- merging ----------------------------------------------------------------------------------------------------------


def test_a_merge_is_in_its_steps_checkpoint_and_in_the_final_save(world, runs, tmp_path):
    before, after = runs.Recorder(), runs.Recorder()
    guard = world.guard(every=2)
    trainer = world.trainer(tmp_path, before, guard, after, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    safety = safety_updates(world, runs)
    for step in (2, 4, 6):
        expected = runs.merged(runs.updates(before.steps[step], LIVE_SCALING), safety, rank=4)
        saved = runs.updates(runs.saved_weights(tmp_path / f"checkpoint-{step}"), LIVE_SCALING)
        assert runs.distance(saved, expected) < 1e-5
        assert runs.distance(runs.updates(before.steps[step], LIVE_SCALING), expected) > 1e-2
    for step in (1, 3, 5):
        assert all(torch.equal(before.steps[step][n], w) for n, w in after.steps[step].items())
    final = runs.saved_weights(tmp_path / "final")
    assert all(torch.equal(final[n], w) for n, w in runs.saved_weights(tmp_path / "checkpoint-6").items())
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [2, 4, 6]


def test_the_final_save_loads_in_plain_peft_with_the_same_logits(world, runs, tmp_path):
    from peft import PeftModel

    trainer = world.trainer(tmp_path, world.guard(every=0))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(world.aligned), tmp_path / "final")
    ids = torch.tensor([row["input_ids"] for row in runs.tokens(2)])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_the_threshold_gate_merges_those_below_and_no_other(world, runs, tmp_path):
    before, after = runs.Recorder(), runs.Recorder()
    probe = world.trainer(tmp_path / "probe", model=world.model())
    probe.train()
    cosines = sorted(r.cosine for r in measure(live_factors(probe.model), Subspace.load(world.subspace)).values())
    middle = (cosines[1] + cosines[2]) / 2
    world.trainer(tmp_path / "out", before, world.guard(gate="threshold", threshold=middle, every=0), after).train()
    (check,), (merge,) = runs.entries(tmp_path / "out", "check"), runs.entries(tmp_path / "out", "merge")
    below = {m["name"] for m in check["modules"] if m["cosine"] < middle}
    assert len(below) == 2
    assert {m["name"] for m in merge["modules"]} == below
    changed = {n for n, w in after.steps[6].items() if not torch.equal(w, before.steps[6][n])}
    assert {n.split("layers.")[1].split(".lora_")[0] for n in changed} == {n.split("layers.")[1] for n in below}


def test_project_once_at_the_end(world, runs, tmp_path):
    before, after = runs.Recorder(), runs.Recorder()
    guard = world.guard(method="project", safety_adapter=None, every=0)
    world.trainer(tmp_path, before, guard, after).train()
    subspace = Subspace.load(world.subspace)
    live = runs.updates(before.steps[6], LIVE_SCALING)
    expected = {}
    for name, update in live.items():
        V = subspace.stack([f"layers.{name}"])[0].double()
        expected[name] = V @ V.T @ update / V.norm()
    assert runs.distance(runs.updates(after.steps[6], LIVE_SCALING), expected) < 1e-5
    (merge,) = runs.entries(tmp_path, "merge")
    assert {m["task_weight"] for m in merge["modules"]} == {1.0}


def test_journal_counts_and_compounded_weights(world, runs, tmp_path):
    guard = world.guard(every=2)
    trainer = world.trainer(tmp_path, guard)
    trainer.train()
    assert [e["kind"] for e in runs.entries(tmp_path)] == ["start", *["check", "merge"] * 3, "end"]
    start, end = runs.entries(tmp_path)[0], runs.entries(tmp_path)[-1]
    assert start["config"] == guard.config.to_publish()
    assert (start["num_modules"], start["restored"]) == (4, False)
    assert (end["checks"], end["merges"], end["modules_merged"]) == (3, 3, 12)
    for count, merge in enumerate(runs.entries(tmp_path, "merge"), 1):
        assert [m["task_weight"] for m in merge["modules"]] == [pytest.approx(0.8**count)] * 4
    assert 0 < guard.share < 1
    assert guard.seconds >= end["seconds"] > sum(e["seconds"] for e in runs.entries(tmp_path, "check"))
    assert end["training_seconds"] > end["seconds"]


def test_cooldown_measures_only_and_says_why(world, runs, tmp_path):
    world.trainer(tmp_path, world.guard(every=1, cooldown=3, at_train_end=False)).train()
    assert [e["step"] for e in runs.entries(tmp_path, "check")] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [1, 5]
    held = next(e for e in runs.entries(tmp_path, "check") if e["step"] == 3)["modules"]
    assert {m["merge"] for m in held} == {False}
    assert {m["reason"] for m in held} == {"gate all; cooldown: 2 of 3 steps since the merge at step 1"}


def test_from_and_until(world, runs, tmp_path):
    world.trainer(tmp_path, world.guard(every=1, from_step=2, until_step=3, at_train_end=False)).train()
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [2, 3]


def test_a_share_of_the_run_is_the_steps_that_it_comes_to(world, runs, tmp_path):
    # six steps: a third of them is two
    world.trainer(tmp_path, world.guard(every=1 / 3)).train()
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [2, 4, 6]


def test_metrics_in_the_log_history_are_those_published_and_agree_with_the_journal(world, runs, tmp_path):
    trainer = world.trainer(tmp_path, world.guard(every=3))
    trainer.train()
    logged = [e for e in trainer.state.log_history if "safemerge/modules" in e]
    assert [e["step"] for e in logged] == [3, 6]
    for row, check, merge in zip(logged, runs.entries(tmp_path, "check"), runs.entries(tmp_path, "merge"), strict=True):
        # gate all merges below no cosine
        assert row.keys() - {"step", "epoch"} == EVERY_CHECK - {"safemerge/modules_below"}
        cosines = sorted(m["cosine"] for m in check["modules"])
        assert row["safemerge/cosine_min"] == cosines[0]
        assert row["safemerge/cosine_max"] == cosines[-1]
        assert row["safemerge/cosine_p50"] == pytest.approx((cosines[1] + cosines[2]) / 2)
        assert row["safemerge/residual_max"] == max(m["residual"] for m in merge["modules"])
        moved = [m["signed_z"] * m["update_norm"] for m in check["modules"]]
        assert row["safemerge/moved_mean"] == pytest.approx(sum(moved) / len(moved))
    assert logged[-1]["safemerge/modules_merged_total"] == 8
    assert logged[-1]["safemerge/task_weight_min"] == pytest.approx(0.64)
    assert logged[-1]["safemerge/seconds_total"] > logged[0]["safemerge/seconds_total"] > 0


def test_a_second_start_in_the_same_folder_keeps_the_first_journal(world, runs, tmp_path):
    trainer = world.trainer(tmp_path, world.guard(every=3))
    trainer.train()
    first = (tmp_path / "safemerge.jsonl").read_text()
    trainer.train()
    assert (tmp_path / "safemerge.1.jsonl").read_text() == first
    assert runs.entries(tmp_path)[-1]["merges"] == 2


def test_half_precision_adapters_stay_half_and_merge(world, runs, tmp_path):
    before, after = runs.Recorder(), runs.Recorder()
    model = world.model().to(torch.bfloat16)
    world.trainer(tmp_path, before, world.guard(every=0), after, model=model).train()
    assert {w.dtype for w in after.steps[6].values()} == {torch.bfloat16}
    expected = runs.merged(runs.updates(before.steps[6], LIVE_SCALING), safety_updates(world, runs), rank=4)
    assert runs.distance(runs.updates(after.steps[6], LIVE_SCALING), expected) < 2e-2


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_sft_trainer_with_peft_config(world, runs, tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(**runs.defaults(tmp_path), bf16=False, gradient_checkpointing=False, max_length=8)
    guard = world.guard(every=2)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in runs.tokens()])
    before, after = runs.Recorder(), runs.Recorder()
    trainer = SFTTrainer(
        copy.deepcopy(world.aligned),
        settings,
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=lora,
        callbacks=[before, guard, after],
    )
    trainer.train()
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [2, 4, 6]
    expected = runs.merged(runs.updates(before.steps[6], LIVE_SCALING), safety_updates(world, runs), rank=4)
    assert runs.distance(runs.updates(after.end, LIVE_SCALING), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_dpo_trainer_edits_the_trained_adapter_and_not_the_reference(world, runs, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    settings = DPOConfig(**runs.defaults(tmp_path), bf16=False, gradient_checkpointing=False, max_length=16)
    pairs = [{"prompt": f"w{n} w5", "chosen": f"w{n + 8} w6", "rejected": f"w{n + 9} w7"} for n in range(4, 20)]
    before, after = runs.Recorder(), runs.Recorder()
    trainer = DPOTrainer(
        world.model(),
        args=settings,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(),
        callbacks=[before, world.guard(every=3), after],
    )
    trainer.train()
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [3, 6]
    changed = {n for n, w in after.steps[6].items() if not torch.equal(w, before.steps[6][n])}
    assert changed == {n for n in after.steps[6] if ".default." in n}
    assert any(".ref." in n for n in after.steps[6])


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(64)}
    special = {"unk_token": "w0", "pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), **special)


# --- training is never lost -------------------------------------------------------------------------------------------


def spoil(step_to_spoil, value):
    def act(step, model):
        if step == step_to_spoil:
            with torch.no_grad():
                name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
                assert "layers.0.self_attn.q_proj" in name
                parameter[0, 0] = value

    return act


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_module_is_reported_once_and_not_merged(world, runs, tmp_path, value):
    before, after = runs.Recorder(spoil(4, value)), runs.Recorder()
    trainer = world.trainer(tmp_path, before, world.guard(every=2), after)
    with pytest.warns(UserWarning, match="NaN or infinite") as caught:
        trainer.train()
    assert len([w for w in caught if "safemerge" in str(w.message)]) == 1
    assert trainer.state.global_step == 6
    _, check, last = runs.entries(tmp_path, "check")
    bad = [m for m in check["modules"] if m["cosine"] is None]
    assert [(m["name"], m["merge"]) for m in bad] == [("layers.0.self_attn.q_proj", False)]
    assert "not finite" in bad[0]["reason"]
    assert [len(e["modules"]) for e in runs.entries(tmp_path, "merge")] == [4, 3]
    # two steps later the loss has carried it everywhere
    assert not any(m["merge"] for m in last["modules"])
    broken = {n for n in after.steps[4] if "layers.0.self_attn.q_proj" in n}
    changed = {n for n, w in after.steps[4].items() if not torch.equal(w, before.steps[4][n])}
    assert changed - broken == after.steps[4].keys() - broken


def test_a_fault_in_a_check_is_warned_of_once_recorded_and_training_goes_on(world, runs, tmp_path):
    import shutil

    copied = tmp_path / "copy.safetensors"
    shutil.copy(world.subspace, copied)

    def act(step, model):
        if step == 3:
            copied.write_bytes(b"gone")

    trainer = world.trainer(tmp_path / "out", runs.Recorder(act), world.guard(subspace=str(copied), every=2))
    with pytest.warns(UserWarning, match="measure failed at step 4, nothing was merged, training goes on") as caught:
        trainer.train()
    assert len([w for w in caught if "safemerge" in str(w.message)]) == 1
    assert trainer.state.global_step == 6
    assert [e["step"] for e in runs.entries(tmp_path / "out", "merge")] == [2]
    assert [e["step"] for e in runs.entries(tmp_path / "out", "error")] == [4, 6]


def test_a_merge_that_fails_leaves_the_weights_and_training_goes_on(world, runs, tmp_path):
    guard = world.guard(every=2)

    def act(step, model):
        if step == 3:
            next(iter(guard.session.start.safety[0].factors.values())).A[0, 0] = math.nan

    before, after = runs.Recorder(act), runs.Recorder()
    trainer = world.trainer(tmp_path, before, guard, after)
    with pytest.warns(UserWarning, match="merge failed at step 4, nothing was merged, training goes on"):
        trainer.train()
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [2]
    assert [(e["step"], e["where"]) for e in runs.entries(tmp_path, "error")] == [(4, "merge"), (6, "merge")]
    for step in (4, 6):
        assert all(torch.equal(before.steps[step][n], w) for n, w in after.steps[step].items())
    assert runs.entries(tmp_path, "end")[0]["merges"] == 1


def test_a_journal_that_fails_later_costs_neither_training_nor_merges(world, runs, tmp_path):
    path = tmp_path / "journal" / "j.jsonl"

    def act(step, model):
        if step == 3:
            path.unlink()
            path.mkdir()

    before, after = runs.Recorder(act), runs.Recorder()
    trainer = world.trainer(tmp_path / "out", before, world.guard(every=2, journal=str(path)), after)
    with pytest.warns(UserWarning, match="journal lacks entries from step 4 on") as caught:
        trainer.train()
    assert len([w for w in caught if "safemerge" in str(w.message)]) == 1
    changed = [s for s in after.steps if any(not torch.equal(before.steps[s][n], w) for n, w in after.steps[s].items())]
    assert changed == [2, 4, 6]


def test_a_state_that_cannot_be_saved_costs_nothing_else(world, runs, tmp_path):
    from transformers import TrainerCallback

    class InTheWay(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            place = tmp_path / f"checkpoint-{state.global_step}" / "safemerge_average.safetensors"
            place.mkdir(parents=True, exist_ok=True)

    guard = world.guard(safety_adapter=None, method="ema", ema_every=1)
    trainer = world.trainer(tmp_path, InTheWay(), guard, save_strategy="steps", save_steps=3)
    with pytest.warns(UserWarning, match="state of checkpoint-3 could not be saved"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert runs.stored(tmp_path / "checkpoint-3")["merged_steps"] == [2]


def test_an_adapter_that_is_gone_before_our_last_hook_costs_nothing(world, runs, tmp_path):
    from transformers import TrainerCallback

    class Unload(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            model.merge_and_unload()

    trainer = world.trainer(tmp_path, Unload(), world.guard(every=0))
    with pytest.warns(UserWarning, match="measure failed at step 6"):
        trainer.train()
    assert [e["kind"] for e in runs.entries(tmp_path)] == ["start", "check", "merge", "error", "end"]


def test_no_warning_in_a_sound_run(world, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world.trainer(tmp_path, world.guard(), save_strategy="steps", save_steps=3).train()
    assert [str(w.message) for w in caught if "safemerge" in str(w.message)] == []
