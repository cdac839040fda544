"""Where matrices stay, as a run chooses and tells it; and shares: the same bits, whoever measures."""

import json
import logging
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from safemerge_callback import SafeMergeConfig, Subspace, measure, writer_for
from safemerge_callback.adapters import LoraFactors
from safemerge_callback.decision import Gate
from safemerge_callback.decision.batches import batches
from safemerge_callback.errors import ConfigError, SubspaceError
from safemerge_callback.training.run import shares as shares_module
from safemerge_callback.training.run.shares import RankShare, measure_share, place, shares, stored_bytes
from tests.support.ranks import run_on
from tests.support.trainer import Recorder, lora_weights
from tests.support.world import World


def train(folder, out):
    """What each process runs: matrices measured by one rank or by both, at once or later, and a rank that fails."""
    world, out = World.load(folder), Path(out)
    sizes, broken = [], []
    measured = shares_module.measure

    def counted(factors, subspace, **knobs):
        sizes.append(len(factors))
        if broken and dist.get_rank() == 1:
            raise OSError("rank 1 lost its disk")
        return measured(factors, subspace, **knobs)

    def act(step, model):
        broken[:] = [step] if step in (2, 3) else []

    def run(name, *callbacks, **knobs):
        guard = world.guard(every=2, **knobs)
        trainer = world.trainer(out / name, *callbacks, guard, max_steps=5, ddp_find_unused_parameters=False)
        trainer.train()
        return trainer.model

    shares_module.measure = counted
    told = {}
    for placement in ("disk", "sharded"):
        for later in (False, True):
            name = f"{placement}-{later}"
            sizes.clear()
            model = run(name, placement=placement, asynchronous=later)
            end = {n: w.tolist() for n, w in lora_weights(model).items()}
            told[name] = {"sizes": list(sizes), "end": end}
    for later in (False, True):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run(f"broken-{later}", Recorder(act), placement="sharded", asynchronous=later)
        told[f"broken-{later}"] = [str(w.message) for w in seen if "safemerge" in str(w.message)]
    assert dist.get_world_size() == 2
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def ranks(world, tmp_path_factory):
    """Runs of two processes, each matrix measured by both of them or by one: what each rank told, and the folder."""
    out = tmp_path_factory.mktemp("ranks")
    run_on(2, train, world.folder, out)
    return [json.loads((out / f"rank{n}.json").read_text()) for n in (0, 1)], out


@pytest.mark.parametrize("later", [False, True])
def test_two_ranks_that_share_read_the_same_bits_and_merge_the_same(ranks, runs, later):
    told, out = ranks
    checks = {name: runs.entries(out / f"{name}-{later}", "check") for name in ("disk", "sharded")}
    assert [c["modules"] for c in checks["disk"]] == [c["modules"] for c in checks["sharded"]]
    steps = [(c.get("measured_at"), c["step"]) for c in checks["sharded"]]
    assert steps == ([(2, 3), (4, 5), (None, 5)] if later else [(None, 2), (None, 4), (None, 5)])
    ends = [rank[f"{name}-{later}"]["end"] for rank in told for name in ("disk", "sharded")]
    assert all(end == ends[0] for end in ends)


def test_each_rank_measures_its_share_alone(ranks):
    told, _ = ranks
    for later in (False, True):
        halves = [rank[f"sharded-{later}"]["sizes"] for rank in told]
        assert len(halves[0]) == 4
        assert [a + b for a, b in zip(*halves, strict=True)] == [4] * 4
        assert all(half > 0 for sizes in halves for half in sizes)
    # Without shares the first rank measures for all, but for the rehearsal before training.
    for later in (False, True):
        assert [rank[f"disk-{later}"]["sizes"] for rank in told] == [[4] * 4, [4]]


@pytest.mark.parametrize("later", [False, True])
def test_a_fault_on_one_rank_is_told_on_all_and_costs_the_check(ranks, runs, later):
    told, out = ranks
    (error,) = runs.entries(out / f"broken-{later}", "error")
    assert error["step"] == (3 if later else 2)
    assert error["error"] == "OSError: rank 1 lost its disk (on rank 1 of 2)"
    assert all(len(rank[f"broken-{later}"]) == 1 and "lost its disk" in rank[f"broken-{later}"][0] for rank in told)
    assert [e["step"] for e in runs.entries(out / f"broken-{later}", "merge")] == ([5] if later else [4, 5])


def moved(world, targets=("q_proj", "v_proj")):
    model = world.model(targets=list(targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return writer_for(model).gather()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("most", [1, 5000, 1 << 28])
def test_shares_hold_every_module_once_and_give_the_same_bits(world, monkeypatch, count, most):
    # the package's `measure` is the function, which hides the module of that name from a dotted path
    monkeypatch.setattr(sys.modules["safemerge_callback.decision.batches"], "_BATCH_BYTES", most)
    subspace, factors = Subspace.load(world.subspace), moved(world, ("q_proj", "v_proj", "up_proj", "down_proj"))
    parts = shares(factors, subspace, count)
    assert sorted(n for part in parts for n in part) == sorted(factors)
    whole, found = measure(factors, subspace), {}
    for part in parts:
        found |= dict(measure_share(factors, subspace, RankShare(frozenset(part), tuple(factors)), {}))
    assert found == dict(whole)
    # no rank has more than its even share and one batch
    loads = [sum(stored_bytes(subspace, n) for n in part) for part in parts]
    largest = max(sum(stored_bytes(subspace, n) for n in b.names) for b in batches(factors, subspace))
    assert max(loads) <= sum(loads) / count + largest
    assert measure_share(factors, subspace, None, {}) == whole


def test_modules_without_a_matrix_stay_with_a_rank_that_has_others(tmp_path):
    """A rank that had nothing but such modules would be refused, as a run is that has nothing to measure."""
    from safetensors.torch import save_file

    from safemerge_callback import build_subspace

    torch.manual_seed(0)
    for folder in ("aligned", "unaligned"):
        (tmp_path / folder).mkdir()
    still = torch.randn(9, 8)
    tensors = {f"model.layers.{n}.q_proj.weight": torch.randn(6, 8) for n in range(3)}
    save_file({**tensors, "model.still.weight": still}, tmp_path / "aligned" / "model.safetensors")
    other = {n: w + 0.1 * torch.randn_like(w) for n, w in tensors.items()}
    save_file({**other, "model.still.weight": still}, tmp_path / "unaligned" / "model.safetensors")
    build_subspace(
        tmp_path / "s.safetensors", aligned=tmp_path / "aligned", unaligned=tmp_path / "unaligned", progress=False
    )
    subspace = Subspace.load(tmp_path / "s.safetensors")
    shapes = {**{f"layers.{n}.q_proj": (6, 8) for n in range(3)}, "still": (9, 8)}
    factors = {n: LoraFactors(n, torch.randn(2, i), torch.randn(o, 2), 1.0) for n, (o, i) in shapes.items()}
    parts = shares(factors, subspace, 3)
    assert "still" in parts[0]
    assert len(parts[0]) > 1
    found = {}
    for part in parts:
        found |= dict(measure_share(factors, subspace, RankShare(frozenset(part), tuple(factors)), {}))
    assert found == dict(measure(factors, subspace))


def test_the_choice_is_in_the_log_and_in_the_journal(world, runs, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="safemerge_callback"):
        world.trainer(tmp_path, world.guard(placement="sharded")).train()
    (said,) = [r.getMessage() for r in caplog.records if "alignment matrices" in r.getMessage()]
    # two layers of q_proj (32, 32) and v_proj (16, 32) in float32
    assert "disk, 12.0 KiB a rank: there is one process" in said
    (start,) = runs.entries(tmp_path, "start")
    assert start["placement"] == {"kind": "disk", "sharded": False, "bytes": 12288, "reason": said.split("rank: ")[1]}


def test_a_placement_that_cannot_be_stops_the_run_before_its_first_step(world, tmp_path):
    trainer = world.trainer(tmp_path, world.guard(placement="device"))
    with pytest.raises(ConfigError, match="'device', but the LoRA factors are on cpu"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"placement": "gpu"}, "placement 'gpu' is unknown: choose one of"),
        ({"placement": None}, "placement None is unknown"),
        ({"asynchronous": "yes"}, "asynchronous is 'yes': give true or false"),
        ({"asynchronous": True, "every": 0}, "asynchronous is true but every is 0"),
    ],
)
def test_settings_are_refused_when_made(knobs, said):
    with pytest.raises(ConfigError, match=said):
        SafeMergeConfig(subspace="s", gate="watch", **knobs)


def test_a_run_keeps_what_was_chosen(world, monkeypatch):
    """Where there is a GPU with room: a second measure reads nothing."""
    from safemerge_callback.subspace.placement import PlacementChoice

    monkeypatch.setattr(
        "safemerge_callback.training.run.shares.choose", lambda *_: PlacementChoice("device", False, 1, "told")
    )
    subspace, factors = Subspace.load(world.subspace), moved(world)
    assert place(SafeMergeConfig(subspace="s", gate="watch"), subspace, factors).kind == "device"
    first = measure(factors, subspace)
    monkeypatch.setattr(subspace, "path", Path("gone"))
    assert measure(factors, subspace) == first


@pytest.fixture(scope="module")
def compressed(world, tmp_path_factory):
    """An int8 companion beside a copy of the exact file."""

    from safemerge_callback.subspace.compress import compress_subspace

    folder = tmp_path_factory.mktemp("compressed")
    shutil.copy(world.subspace, folder / "exact.safetensors")
    compress_subspace(folder / "exact.safetensors", folder / "int8.safetensors", progress=False)
    return str(folder / "int8.safetensors")


@pytest.mark.parametrize(
    "gate",
    [
        {"gate": "threshold", "threshold": 0.82},
        {"gate": "num_layers", "num_layers": 2},
        {"gate": "gap"},
        {"gate": "calibrated", "z_threshold": 0},
        {"gate": "reference", "reference_fraction": 1.0, "soft": True},
        {"gate": "random", "threshold": 0.82},
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_a_compressed_subspace_gives_the_exact_decisions_in_a_run(world, runs, tmp_path, compressed, gate, later):
    for name, subspace in {"exact": world.subspace, "int8": compressed}.items():
        guard = world.guard(**gate, subspace=subspace, asynchronous=later, placement="disk")
        world.trainer(tmp_path / name, guard).train()
    exact, int8 = (
        [[(m["name"], m["merge"]) for m in e["modules"]] for e in runs.entries(tmp_path / name, "check")]
        for name in ("exact", "int8")
    )
    assert exact == int8
    assert any(merge for check in exact for _, merge in check)


def test_a_compressed_subspace_without_its_exact_file_only_watches(world, tmp_path, compressed):
    alone = shutil.copy(compressed, tmp_path)
    trainer = world.trainer(tmp_path, world.guard(subspace=alone, gate="threshold", threshold=0.3))
    with pytest.raises(SubspaceError, match="the exact file it was made from is not beside it"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(SubspaceError, match="is not beside it"):
        world.trainer(tmp_path, world.guard(subspace=alone, gate="gap")).train()
    watching = world.guard(subspace=alone, gate="watch", safety_adapter=None)
    world.trainer(tmp_path, watching).train()
    assert watching.progress.checks == 3


@pytest.mark.parametrize("knobs", [{"gate": "num_layers", "num_layers": 2}, {"gate": Gate("gap")}])
def test_a_part_is_read_exactly_where_the_gate_ranks_all_modules(world, compressed, knobs):
    subspace, factors = Subspace.load(compressed), moved(world)
    assert subspace.compressed
    ranked = {**knobs, "reference": dict.fromkeys(factors, 0.5)}
    alone = RankShare(frozenset(list(factors)[:2]), tuple(factors))
    exact = measure(factors, Subspace.load(world.subspace))
    for name, reading in measure_share(factors, subspace, alone, ranked).items():
        assert (reading.interval, reading.reference) == (None, 0.5)
        assert reading.cosine == pytest.approx(exact[name].cosine, abs=1e-6)
    assert any(r.interval for r in measure_share(factors, subspace, alone, {"gate": "watch"}).values())
