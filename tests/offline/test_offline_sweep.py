"""A sweep tells what the merges really do: each cell against the merge itself, made on disk."""

import csv
import math
from dataclasses import replace

import pytest
import torch

from safemerge_callback.adapters import load_adapter, save_adapter
from safemerge_callback.decision import Gate
from safemerge_callback.errors import AdapterError, ConfigError, PlanError
from safemerge_callback.methods import METHODS, as_how, get_method
from safemerge_callback.offline import merge_adapters, sweep_adapters
from safemerge_callback.offline.sweep.small_space import fits_core, in_core
from safemerge_callback.ops import LowRank

GATES = [Gate(threshold=0.0), Gate("num_layers", num_layers=3), Gate("quantile", quantile=0.5), Gate("all")]
OFFLINE = sorted(name for name, method in METHODS.items() if not method.needs & {"average", "grams"})


def updates(folder):
    return {n: f.scaling * f.B.double() @ f.A.double() for n, f in load_adapter(folder).factors.items()}


def swept(world, **knobs):
    knobs = {"gates": GATES, "weights": [(0.8, 0.2), (0.3, 0.6)], **knobs}
    return sweep_adapters(world / "task", world / "safety", world / "s.safetensors", **knobs)


def assert_is_the_merge(world, cell, safety, **knobs):
    """The cell's figures, out of the adapter that `merge_adapters` writes, in dense float64."""
    gate = {"gate": cell.gate, **({cell.gate: cell.knob} if cell.knob is not None else {})}
    knobs = {**knobs, **({"weights": cell.weights} if get_method(cell.method).weighted else {})}
    plan = merge_adapters(
        world / "task", safety, world / "s.safetensors", world / "out", method=cell.method, space=cell.space,
        overwrite=True, **gate, **knobs,
    )  # fmt: skip
    old, new = updates(world / "task"), updates(world / "out")
    norm = math.sqrt(sum(float(x.norm()) ** 2 for x in old.values()))
    away = math.sqrt(sum(float((new[name] - old[name]).norm()) ** 2 for name in old))
    inner = sum(float((new[name] * old[name]).sum()) for name in old)
    after = math.sqrt(sum(float(x.norm()) ** 2 for x in new.values()))
    assert cell.merged == len(plan.selected)
    assert cell.modules == len(old)
    assert cell.moved == pytest.approx(away / norm, abs=2e-6)
    assert cell.cosine == pytest.approx(inner / (norm * after), abs=2e-6)


@pytest.mark.filterwarnings("ignore:safemerge. nothing was merged")
@pytest.mark.parametrize("method", OFFLINE)
def test_every_cell_is_what_the_merge_does(world, method):
    rule = get_method(method)
    density = {"density": 0.5} if "density" in rule.takes else {}
    cells = swept(world, methods=[method], **density)
    assert len(cells) == len(GATES) * (2 if rule.weighted else 1)
    for cell in cells:
        assert_is_the_merge(world, cell, world / "safety", **density)
    assert cells[0].merged == 0
    assert (cells[0].moved, cells[0].cosine, cells[0].residual) == (0, 1, 0)
    assert any(cell.merged == 3 and cell.moved > 0 for cell in cells)


def test_a_gate_may_be_given_by_its_name_alone(world):
    assert swept(world, gates=["all", "threshold"])[:] == swept(world, gates=[Gate("all"), Gate("threshold")])[:]
    with pytest.raises(ConfigError, match=r"gate 'al' is unknown.*did you mean 'all'"):
        swept(world, gates=["al"])
    with pytest.raises(ConfigError, match="gate 'watch' merges nothing"):
        swept(world, gates=["watch"])


def test_the_residual_is_what_the_rank_drops(world):
    (cell,) = swept(world, gates=[Gate("all")], weights=[(0.7, 0.4)])
    old, other = updates(world / "task"), updates(world / "safety")
    total = dropped = 0.0
    for name in old:
        values = torch.linalg.svdvals(0.7 * old[name] + 0.4 * other[name])
        total, dropped = total + float(values.square().sum()), dropped + float(values[4:].square().sum())
    assert cell.residual == pytest.approx(math.sqrt(dropped / total), rel=1e-6)
    assert cell.residual > 0.01


def test_several_safety_adapters_of_other_ranks(world):
    both = [world / "safety", world / "other"]
    cells = sweep_adapters(
        world / "task", both, world / "s.safetensors", gates=GATES[1:], weights=[(0.6, 0.3, 0.1), (1.0, 0.5, -0.5)]
    )
    for cell in cells:
        assert_is_the_merge(world, cell, both)


def test_a_method_in_the_core_is_the_method_itself():
    """Norms, inner products and singular values of the small factors are those of the updates, in every gauge."""
    generator = torch.Generator().manual_seed(3)
    updates = [
        LowRank(torch.randn(r, 40, generator=generator), torch.randn(30, r, generator=generator)) for r in (4, 2, 3)
    ]
    small = in_core(updates)
    dense = [u.B.double() @ u.A.double() for u in updates]
    core = [u.B @ u.A for u in small]
    assert [tuple(u.A.shape) for u in small] == [(4, 9), (2, 9), (3, 9)]
    for x, u in zip(dense, core, strict=True):
        for y, v in zip(dense, core, strict=True):
            torch.testing.assert_close((u * v).sum(), (x * y).sum(), rtol=1e-9, atol=1e-9)
    values = torch.linalg.svdvals(sum(core))
    torch.testing.assert_close(values[:9], torch.linalg.svdvals(sum(dense))[:9], rtol=1e-7, atol=1e-7)


def test_what_is_entrywise_or_reads_v_is_carried_out_instead():
    pruned = {"density": 0.5}
    hows = [as_how(name, pruned if "density" in method.takes else {}) for name, method in METHODS.items()]
    small = {how.method for how in hows if fits_core(how)}
    assert small >= {"linear", "cat", "slerp", "orthogonal"}
    assert not small & {"project", "ties", "dare_linear", "ema"}


def test_the_table_and_the_csv_say_the_same(world):
    cells = swept(world, methods=["linear", "cat"])
    text = str(cells)
    assert "16 merges of 6 modules, none of them made" in text
    assert "num_layers 3" in text
    with cells.write_csv(world / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["moved"]) for row in rows] == [cell.moved for cell in cells]
    assert rows[0]["weights"] == "0.8/0.2"
    assert {row["method"] for row in rows} == {"linear", "cat"}
    with pytest.raises(ConfigError, match="cannot be written"):
        cells.write_csv(world / "sweep.csv" / "below.csv")


def test_the_plot_is_a_picture(world):
    from safemerge_callback.reports.sweep_plot import write_plot

    assert write_plot(swept(world), world / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="must end in one of"):
        write_plot(swept(world), world / "sweep.txt")


@pytest.mark.parametrize(
    ("error", "match", "knobs"),
    [
        (ConfigError, "soft weights differ", {"gates": [Gate(soft=True)]}),
        (ConfigError, "'watch' merges nothing", {"gates": [Gate("watch")]}),
        (ConfigError, "at least one gate", {"gates": []}),
        (ConfigError, "did you mean 'linear'", {"methods": ["linaer"]}),
        (ConfigError, "density is missing", {"methods": ["linear", "ties"]}),
        (ConfigError, "with 1 safety adapters", {"weights": [(0.5, 0.25, 0.25)]}),
        (ConfigError, "average of a run's own updates", {"methods": ["ema"]}),
    ],
)
def test_refusals(world, error, match, knobs):
    with pytest.raises(error, match=match):
        swept(world, **knobs)


def test_a_safety_adapter_is_asked_for_and_has_to_fit(world, tiny_llama, save_lora):
    with pytest.raises(PlanError, match="method 'linear' needs a safety adapter"):
        sweep_adapters(world / "task", None, world / "s.safetensors", gates=GATES, methods=["linear"])
    assert len(sweep_adapters(world / "task", None, world / "s.safetensors", gates=GATES, methods=["project"])) == 4
    save_lora(tiny_llama, world / "partial", 7, ["q_proj", "down_proj"])
    with pytest.raises(AdapterError, match="lacks 2 of 6"):
        sweep_adapters(world / "task", world / "partial", world / "s.safetensors", gates=GATES)


def test_the_defaults_are_the_callbacks_and_what_the_paper_would_do(world):
    cells = sweep_adapters(world / "task", world / "safety", world / "s.safetensors")
    assert [(cell.gate, cell.method) for cell in cells] == [("all", "linear"), *[("threshold", "linear")] * 8]
    assert cells[0].merged == cells[0].modules == 6
    without = sweep_adapters(world / "task", None, world / "s.safetensors")
    assert {cell.method for cell in without} == {"pull"}
    # a pull toward the aligned model takes its strength of every update away
    assert without[0].moved == pytest.approx(0.2)


@pytest.mark.parametrize("method", ["linear", "pull"])
def test_an_adapter_that_was_not_trained_yet_is_swept(world, tmp_path, method):
    task = load_adapter(world / "task")
    nothing = {name: replace(module, B=torch.zeros_like(module.B)) for name, module in task.factors.items()}
    save_adapter(tmp_path / "nothing", replace(task, factors=nothing))
    safety = world / "safety" if method == "linear" else None
    found = sweep_adapters(tmp_path / "nothing", safety, world / "s.safetensors", gates=[Gate("all")])
    assert {cell.method for cell in found} == {method}
    assert {cell.moved for cell in found} == {math.inf if safety else 0.0}
    assert found.write_csv(tmp_path / "x.csv").read_text().count("inf") == (len(found) if safety else 0)
    assert str(found)
