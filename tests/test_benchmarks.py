"""Every benchmark runs at a tiny size and writes figures that fit together; what they are is nobody's claim here."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cost_by_size, hardware, model_shapes, sweep, training_share
from safemerge_callback.decision import measure
from tests.support.ranks import finish, started

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a benchmark's `main` with arguments; return what it wrote and what it printed."""

    def bench(name, *args):
        output = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", [name, *args, "--output", str(output)])
        importlib.import_module(f"benchmarks.{name}").main()
        return json.loads(output.read_text()), capsys.readouterr().out

    return bench


def assert_names_the_machine(results, printed):
    machine = results["hardware"]
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()
    assert machine["date"] in printed
    assert machine["device"] in printed.replace("\n", "")


def test_one_module_against_the_formula_and_peft(run):
    results, printed = run("measure_and_merge", "--size", "48", "--rank", "4", "--repeats", "1")
    assert_names_the_machine(results, printed)
    rows = {(row["work"], row["peer"]): row for row in results["rows"]}
    assert len(rows) == 5
    assert all(row["our_seconds"] > 0 and row["peer_seconds"] > 0 for row in rows.values())
    assert rows["cosine of a module, C kept", "published formula"]["ours_off_by"] < 1e-6
    assert rows["merge of a module, exact", "PEFT svd"]["ours_off_by"] < 1e-5


def test_all_modules_of_a_model_against_the_formula_and_peft(run):
    results, printed = run("model_shapes", "--model", "tiny", "--layers", "2", "--rank", "3", "--repeats", "1")
    assert_names_the_machine(results, printed)
    assert "2 of 2 layers, 14 modules" in printed
    measured, merged = results["rows"]
    assert measured["apart"] < 1e-5
    assert merged["apart"] < 1e-5
    sizes = [rows * columns for rows, columns in model_shapes.MODELS["tiny"].shapes().values()]
    assert measured["our_resident_bytes"] == 4 * sum(sizes)
    assert merged["peer_seconds"] == pytest.approx(
        2
        * sum(
            merged["peer_by_shape"][shape] * n for shape, n in {"64x64": 2, "32x64": 2, "96x64": 2, "64x96": 1}.items()
        )
    )


def test_without_the_peers_svd_its_column_says_so(run):
    results, printed = run("model_shapes", "--model", "tiny", "--layers", "1", "--repeats", "1", "--skip-svd")
    assert "peer_seconds" not in results["rows"][1]
    assert "not measured" in printed


def test_the_shapes_are_those_of_the_models():
    count = {name: sum(r * c for r, c in model.shapes().values()) for name, model in model_shapes.MODELS.items()}
    assert len(model_shapes.MODELS["7b"].shapes()) == 224
    assert model_shapes.MODELS["7b"].shapes()["layers.31.down_proj"] == (4096, 11008)
    # All weights but embeddings, head and norms: 6.5 of 6.7, 68.5 of 69.0, 0.97 of 1.24, 0.106 of 0.135 billion.
    assert [round(count[name] / 1e9, 2) for name in ("7b", "70b", "1b", "135m")] == [6.48, 68.45, 0.97, 0.11]


def test_the_same_v_serves_both_sides():
    shapes = model_shapes.MODELS["tiny"].shapes()
    factors = model_shapes.random_factors(shapes, 3, "cpu")
    subspace, held = model_shapes.random_subspace(shapes, torch.float32)
    readings = measure(factors, subspace)
    assert sorted(held.matrices()) == sorted(shapes)
    V = held.matrices()["layers.1.down_proj"].double()
    update = (factors["layers.1.down_proj"].B @ factors["layers.1.down_proj"].A).double()
    dense = torch.cosine_similarity((V @ V.T @ update).flatten(), update.flatten(), dim=0)
    assert readings["layers.1.down_proj"].cosine == pytest.approx(float(dense), abs=1e-6)


def test_cost_against_size(run):
    results, printed = run("cost_by_size", "--models", "tiny", "135m", "1b", "--memory", "0.02", "--repeats", "1")
    assert_names_the_machine(results, printed)
    tiny, small, large = results["rows"]
    assert (tiny["measured_layers"], small["measured_layers"], large["measured_layers"]) == (2, 1, 1)
    assert small["seconds"] == pytest.approx(30 * small["measured_seconds"])
    assert "1 of 30, the rest computed" in printed
    assert set(results["line"]) == {"slope", "intercept", "r_squared"}


def test_operations_are_those_of_the_formula():
    d_out, d_in, r = 96, 64, 8
    model = cost_by_size.Model(layers=1, hidden=d_in, intermediate=d_out, kv=d_in)
    squares, tall = 4, 2
    with_v = 4 * r * d_in * (squares * d_in + (tall + 1) * d_out)
    # A·Aᵀ and a Gram of thin factors, each three times, or A·Aᵀ once where it is kept.
    small = [
        2 * r * r * (a * (squares * d_in + tall * d_in + d_out) + 3 * (squares * d_in + tall * d_out + d_in))
        for a in (1, 3)
    ]
    assert cost_by_size.operations(model, r) - with_v in small


def test_a_line_is_that_of_least_squares():
    assert cost_by_size.line([(0, 1), (1, 3), (2, 5)]) == {"slope": 2, "intercept": 1, "r_squared": pytest.approx(1)}
    assert cost_by_size.line([(0, 1), (1, 3)]) is None


def test_zeroth_order_takes_less_memory_than_gradients(run, monkeypatch):
    monkeypatch.setattr("benchmarks.zeroth_order.VOCABULARY", 64)
    results, printed = run("zeroth_order", "--hidden", "64", "--layers", "2", "--batch", "2", "--length", "16")
    assert_names_the_machine(results, printed)
    rows = {(row["trained"], row["method"]): row for row in results["rows"]}
    assert len(rows) == 6
    for trained in ("lora", "all"):
        assert rows[trained, "adamw"]["bytes_share"] == 1
        assert all(rows[trained, method]["bytes_share"] < 1 for method in ("mezo", "tezo"))


def test_other_ways_to_compute_the_same(run):
    results, printed = run("variants", "--batches", "3x32x2", "2x16x4", "--repeats", "1", "--skip-compile")
    assert_names_the_machine(results, printed)
    assert [row["work"] for row in results["rows"]][:2] == [
        f"{work} of 3 modules 32 x 32, r 2" for work in ("cosine", "merge")
    ]


def test_the_share_of_training_is_against_the_same_turn(tmp_path):
    """Arms that take 10, 11 and 12 seconds and slow down together: shares stay what they are."""
    trained = []

    def train(arm, folder, steps):
        trained.append((arm, steps))
        seconds = {"none": 10.0, "synchronous": 11.0, "asynchronous": 12.0}[arm] * (1 + int(folder.name[-1] == "1"))
        cost = {"share": 0.5 / seconds, "checks": 4, "merges": 4, "modules_merged": 240}
        return {"seconds": seconds, "losses": [], **({} if arm == "none" else {"callback": cost})}

    names = training_share.arms()
    runs = training_share.study(train, names, 100, 2, tmp_path)
    assert trained[0] == ("none", 2)
    assert [arm for arm, _ in trained[1:]] == [*names, *names[1:], names[0]]
    rows = {row["arm"]: row for row in training_share.shares(runs)}
    assert rows["synchronous"]["walls"] == pytest.approx([0.1, 0.1])
    assert rows["synchronous"]["own_share"] == pytest.approx((0.5 / 11 + 0.5 / 22) / 2)
    assert rows["synchronous"]["target"] == 0.01
    training_share.report({"hardware": hardware.hardware(), "about": "", "rows": list(rows.values()), "runs": runs})


@pytest.mark.slow
def test_the_share_of_a_real_training(run):
    settings = ["--num_examples", "8", "--per_device_train_batch_size", "2"]
    results, printed = run("training_share", "--steps", "4", "--every", "2", "--repeats", "1", *settings)
    assert_names_the_machine(results, printed)
    plain, guarded, *_ = results["rows"]
    assert (plain["arm"], guarded["checks"]) == ("none", 2)
    assert 0 < guarded["own_share"] < 0.5
    losses = {arm: runs[0]["losses"] for arm, runs in results["runs"].items()}
    assert losses["none"][:2] == losses["synchronous"][:2]
    assert losses["none"] != losses["synchronous"]


def test_bytes_held_at_once_are_counted():
    a = torch.ones(1000, 1000)
    assert 8_000_000 <= hardware.extra_bytes(lambda: [a + 1, a + 2]) < 8_000_100
    assert 4_000_000 <= hardware.extra_bytes(lambda: [float((a + i).sum()) for i in range(3)]) < 4_100_000


def test_every_page_of_figures_names_its_commands():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in ("measure_and_merge", "model_shapes", "variants", "cost_by_size", "training_share"):
        assert f"python -m benchmarks.{name}" in page
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert file.name in page or not file.name.endswith("measure_and_merge.json"), file


def test_a_probe_of_a_model_in_training(run, monkeypatch, tiny_llama, chat_tokenizer, tmp_path):
    from benchmarks import safety_probe

    chat_tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama(pad_token_id=2, initializer_range=0.6).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(safety_probe, "sets", lambda n: ({"bad": ["a b"] * (n - 1)}, {"good": ["c"]}))
    small = ("--prompts", "4", "--new-tokens", "3", "--batch-size", "2", "--repeats", "2")
    results, printed = run("safety_probe", "--model", str(tmp_path / "model"), *small)
    assert_names_the_machine(results, printed)
    assert [row["n"] for row in results["rows"]] == [3, 1, 4]
    assert len(results["seconds"]) == 2
    assert results["tokens"] == pytest.approx(results["tokens_a_second"] * results["median_seconds"])
    assert 4 <= results["tokens"] <= 12
    assert "under 25 s" in printed


def test_what_a_check_costs_in_a_tracker(run):
    small = ["--trackers", "tensorboard", "--layers", "1", "--checks", "5"]
    results, printed = run("tracker_cost", *small)
    assert_names_the_machine(results, printed)
    cost = results["milliseconds"]["tensorboard"]
    # two of the five are without a heat map: 3 and 5
    assert 0 < cost["median"] <= cost["largest"]
    assert cost["heat_map"] <= cost["heat_map_largest"]
    assert cost["total"] * 1000 >= 2 * cost["median"] + 3 * min(cost["heat_map"], cost["median"])


def report_in(folder, script):
    """What a fork runs in place of a new process."""
    os.chdir(folder)
    exec(script, {})


@pytest.mark.parametrize(("name", "runs"), [("sweep", 2), ("merge_files", 4)])
def test_verbs_on_files_at_a_models_size(run, tmp_path, monkeypatch, name, runs):
    """The sweep in new processes, as both benchmarks run; the merges in forks, which need not import torch again."""

    def in_a_fork(script, folder):
        with started(1, report_in, folder, sweep.PEAK + script) as ranks:
            finish(ranks)
            return json.loads(ranks[0].said().splitlines()[-1])

    if name == "merge_files":
        monkeypatch.setattr(sweep, "in_new_process", in_a_fork)
    small = ("--modules", "3", "--size", "48", "--rank", "2", "--folder", str(tmp_path / "world"))
    results, printed = run(name, *small)
    assert_names_the_machine(results, printed)
    assert len(results["runs"]) == runs
    for row in results["runs"].values():
        assert 0 < row["bytes_before"] <= row["peak_bytes"]
        assert row["modules"] == 3
    if name == "merge_files":
        assert [row["merged"] for row in results["runs"].values()] == [3] * 4
    assert not (tmp_path / "world" / "out").exists()
