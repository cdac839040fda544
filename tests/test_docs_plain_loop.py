"""The loop of docs/plain_loop.md, as the page has it: it merges by the formula and leaves a plain adapter."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import safemerge_callback
from benchmarks.trainers.cell import logits, safety_updates
from benchmarks.trainers.witness import best_of_rank, dense
from benchmarks.trainers.world import make_base
from safemerge_callback import read_journal
from safemerge_callback.corrections.replay import ReplaySettings

PAGE = Path(__file__).parents[1] / "docs" / "plain_loop.md"
CODE, REPLAYED, TRACKED = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("plain_loop"), "llama")


@pytest.fixture
def ready(base, tmp_path, monkeypatch):
    """A folder with the files that the page names; the page's code runs in it."""
    (tmp_path / "model.subspace.safetensors").symlink_to(base.folder / "subspace.safetensors")
    (tmp_path / "safety-adapter").symlink_to(base.folder / "safety")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(2)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base.model(), lora)


def batches(count):
    rng = torch.Generator().manual_seed(5)
    for _ in range(count):
        ids = torch.randint(9, 60, (2, 8), generator=rng)
        yield {"input_ids": ids, "labels": ids}


def changed(code, old, new):
    assert code.count(old) == 1
    return code.replace(old, new)


def test_as_it_stands_it_checks_at_step_50(ready, capsys):
    exec(compile(CODE, str(PAGE), "exec"), {"model": ready, "batches": batches(50)})
    entries = read_journal("out/safemerge.jsonl")
    assert [(e["kind"], e["step"], len(e["modules"])) for e in entries] == [("check", 50, 4)]
    assert "layers.0.self_attn.q_proj" in capsys.readouterr().out
    assert Path("out/adapter_model.safetensors").is_file()


def test_its_merges_are_the_formula_and_the_saved_adapter_is_plain_peft(ready, base, monkeypatch):
    seen = []

    def spied(plan, writer, *rest):
        before = {name: dense(f.A, f.B, f.scaling) for name, f in writer.gather().items()}
        edits = apply(plan, writer, *rest)
        seen.append((before, {name: dense(f.A, f.B, f.scaling) for name, f in writer.gather().items()}))
        return edits

    apply = safemerge_callback.apply
    monkeypatch.setattr(safemerge_callback, "apply", spied, raising=False)
    code = changed(changed(CODE, '"gate": "threshold"', '"gate": "all"'), "every = steps // 6", "every = 2")
    exec(compile(code, str(PAGE), "exec"), {"model": ready, "batches": batches(6)})

    assert len(seen) == 3
    safety = safety_updates(base)
    for before, after in seen:
        for name, update in after.items():
            expected = best_of_rank(0.8 * before[name] + 0.2 * safety[name], 4)
            assert float((update - expected).norm() / expected.norm()) < 1e-4
    fresh = PeftModel.from_pretrained(base.model(), "out").eval()
    with torch.no_grad():
        assert torch.equal(logits(ready.eval()), logits(fresh))
    assert [e["step"] for e in read_journal("out/safemerge.jsonl")] == [2, 4, 6]


def test_the_optimizer_trains_on_from_the_merged_factors(ready):
    code = changed(changed(CODE, '"gate": "threshold"', '"gate": "all"'), "every = steps // 6", "every = 3")
    states = {}

    def watched():
        for step, batch in enumerate(batches(4), start=1):
            states[step] = {n: p.detach().clone() for n, p in ready.named_parameters() if "lora_" in n}
            yield batch
        states["end"] = {n: p.detach().clone() for n, p in ready.named_parameters() if "lora_" in n}

    exec(compile(code, str(PAGE), "exec"), {"model": ready, "batches": watched()})
    for name, merged in states[4].items():
        moved = float((states["end"][name] - merged).abs().max())
        # Adam's steps are at most a few times the learning rate, 1e-3; a merge undone would be far more.
        assert 0 < moved < 1e-2, name


def test_the_loop_that_logs_sends_its_checks_to_tensorboard(ready):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    setup = changed(CODE.split("model.train()")[0], 'journal = Journal("out/safemerge.jsonl")\n', "")
    setup = changed(changed(setup, '"gate": "threshold"', '"gate": "all"'), "every = steps // 6", "every = 2")
    exec(compile(setup + TRACKED, str(PAGE), "exec"), {"model": ready, "batches": batches(4)})
    events = EventAccumulator("out/runs/safemerge")
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("safemerge/modules_merged")] == [(2, 4), (4, 4)]
    assert [e.step for e in events.Scalars("my/accuracy")] == [2, 4]
    entries = read_journal("out/safemerge.jsonl")
    assert [(e["kind"], e["step"]) for e in entries] == [("check", 2), ("merge", 2), ("check", 4), ("merge", 4)]


def test_the_two_lines_of_replay_hold_the_rows_that_the_loop_loses(ready, chat_tokenizer):
    rows = [
        {"prompt": "a b c", "response": "w0 w1 w2", "kind": "harm"},
        {"prompt": "f g h", "response": "yes w5 w6", "kind": "benign"},
    ]
    settings, code = ReplaySettings(rows=rows, batch_size=2), changed(REPLAYED, "tokenizer)", "tokenizer, settings)")
    first, last = {k: v.clone() for k, v in ready.state_dict().items()}, {}
    for name, loop in {"held": code, "plain": changed(code, " + rows.loss(model)", "")}.items():
        ready.load_state_dict(first)
        optimizer = torch.optim.AdamW([p for p in ready.parameters() if p.requires_grad], lr=1e-2)
        names = {"model": ready, "tokenizer": chat_tokenizer, "settings": settings, "batches": batches(30)}
        names["optimizer"] = optimizer
        exec(compile(loop, str(PAGE), "exec"), names)
        last[name] = names["rows"].loss(ready).item()
    assert last["held"] < 0.5 * last["plain"]
