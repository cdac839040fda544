"""Merges of files that ask the model about rows: `regmean` and `safety_slope` from two files, and what they refuse."""

import json

import pytest
import torch

from safemerge_callback import merge_adapters
from safemerge_callback.adapters import load_adapter
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.loading import load_subject
from safemerge_callback.evaluation.rows import load_rows
from safemerge_callback.ops import Grams, regression
from safemerge_callback.signals.adapter_off import adapter_off
from safemerge_callback.signals.row_inputs import row_inputs
from safemerge_callback.signals.rows import row_tokens
from tests.support import world as support
from tests.support.replay import ROWS
from tests.support.trainer import entries
from tests.test_cli import run

TASK = [{"prompt": f"w{i} b c", "response": f"w{i + 1} w2", "kind": "benign"} for i in range(5)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `aligned`, which talks, `task` and `safety` on it, `s.safetensors` and two files of rows."""
    return tmp_path_factory.mktemp("rows")


@pytest.fixture
def folder(place, chat_tokenizer):
    if (place / "task").is_dir():
        return place
    aligned = support.grouped_llama()
    support.write_checkpoints(place, aligned, tokenizer=chat_tokenizer)
    support.write_subspace(place, "s.safetensors")
    for name, seed in (("task", 5), ("safety", 6)):
        support.save_lora(
            lambda seed: support.grouped_llama(), place / name, seed, support.TARGETS, task_type="CAUSAL_LM"
        )
    for name, rows in (("t.jsonl", TASK), ("r.jsonl", ROWS)):
        (place / name).write_text("\n".join(map(json.dumps, rows)))
    return place


def merged(folder, output, safety=None, **knobs):
    files = {"task_rows": folder / "t.jsonl", "safety_rows": folder / "r.jsonl", "base": str(folder / "aligned")}
    adapter = None if safety is None else folder / safety
    return merge_adapters(
        folder / "task", adapter, folder / "s.safetensors", output, device="cpu", **{**files, **knobs}
    )


def test_A_is_regressed_by_the_rows_of_two_files(folder, tmp_path):
    plan = merged(folder, tmp_path / "out", method="regmean", mu=2.0)
    subject = load_subject(str(folder / "task"), base=str(folder / "aligned"), device="cpu")
    task, safety = (row_tokens(subject.tokenizer, load_rows(rows, both=False)) for rows in (TASK, ROWS))
    F = row_inputs(subject.model, task, whole=True)
    with adapter_off(subject.model):
        S = row_inputs(subject.model, [row for row in safety if row.kind == "harm"])
    before, after = (load_adapter(at).factors for at in (folder / "task", tmp_path / "out"))
    for name, module in after.items():
        wanted = regression(Grams(F[name], S[name]), mu=2.0, ridge=0.3).task_part(before[name].A)
        assert torch.equal(module.B, before[name].B)
        assert torch.allclose(module.A.double(), wanted, rtol=1e-4, atol=1e-6)
        assert 0 < plan.readings[name].signals["gram_cosine"] <= 1
    assert {"gram_cosine", "unused_features"} <= entries(tmp_path / "out", "check")[0]["modules"][0].keys()
    again = tmp_path / "again"
    run("merge", "--config", tmp_path / "out" / "safemerge.yaml", "-o", again)
    assert all(torch.equal(load_adapter(again).factors[n].A, m.A) for n, m in after.items())


def test_a_safety_adapter_is_the_second_expert(folder, tmp_path):
    merged(folder, tmp_path / "out", safety="safety", method="regmean")
    (merge,) = entries(tmp_path / "out", "merge")
    assert all(module["residual"] > 0 for module in merge["modules"])


def test_antidote_prunes_by_the_inputs_on_harmful_rows(folder, tmp_path):
    merged(folder, tmp_path / "out", method="antidote", prune_share=0.25)
    subject = load_subject(str(folder / "task"), base=str(folder / "aligned"), device="cpu")
    harmful = [row for row in row_tokens(subject.tokenizer, load_rows(ROWS, both=False)) if row.kind == "harm"]
    with adapter_off(subject.model):
        S = row_inputs(subject.model, harmful)
    before, after = (load_adapter(at).factors for at in (folder / "task", tmp_path / "out"))
    (merge,) = entries(tmp_path / "out", "merge")
    assert merge["prune_share"] == 0.25
    for module in merge["modules"]:
        old, new, norms = before[module["name"]].update, after[module["name"]].update, S[module["name"]].norm(dim=0)
        whole = old.B @ old.A
        top = (whole.abs() * norms).topk(whole.shape[-1] // 4, dim=-1).indices
        pruned = whole.scatter(-1, top, 0.0)
        values = torch.linalg.svdvals(pruned.double())
        wanted = values[old.A.shape[-2] :].norm() / values.norm()
        assert module["residual"] == pytest.approx(float(wanted), rel=1e-4)
        assert float((pruned - new.B @ new.A).norm() / pruned.norm()) == pytest.approx(float(wanted), rel=1e-4)
        assert module["safety_outputs"] < 1.0


def test_modules_are_chosen_by_their_slopes(folder, tmp_path):
    plan = merged(folder, tmp_path / "out", gate="safety_slope", slope_share=0.5, per_task_slope=True, strength=0.5)
    slopes = {name: reading.signals["safety_slope"] for name, reading in plan.readings.items()}
    assert {"safety_slope", "task_slope"} == set(next(iter(plan.readings.values())).signals)
    assert set(plan.selected) <= {name for name, slope in slopes.items() if slope > 0}


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        (
            {"method": "regmean", "safety_rows": None},
            "method 'regmean' asks the model about rows, and safety_rows is missing",
        ),
        (
            {"method": "regmean", "task_rows": None},
            "method 'regmean' asks the model about rows, and task_rows is missing",
        ),
        ({"gate": "safety_slope", "safety_rows": None}, "gate 'safety_slope' asks the model about rows"),
        ({"method": "pull"}, "task_rows is given, and neither gate, method nor rules ask the model"),
        ({"method": "regmean", "safety_rows": TASK}, "none of 5 rows is harmful"),
        ({"method": "regmean", "base": "nowhere-to-be-found"}, "nowhere-to-be-found"),
    ],
)
def test_what_cannot_be_is_refused(folder, tmp_path, knobs, says):
    with pytest.raises(ConfigError, match=says):
        merged(folder, tmp_path / "out", **knobs)
    assert not (tmp_path / "out").exists()
