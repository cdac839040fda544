"""One training with three merges on every engine, in fp32 and bf16: equal to one process, to each other, and kept."""

import importlib.util
import json
import math
import statistics

import pytest
import torch

from safemerge_callback.adapters import LoraFactors, load_adapter
from safemerge_callback.decision import MergePlan, measure
from safemerge_callback.decision.apply import merged_factors
from safemerge_callback.ops import LowRank
from safemerge_callback.subspace import Subspace
from tests.support.ranks import finish, run_on, started
from tests.trajectory.engines import run as engine_runs

DTYPES, KINDS, EVENTS = ("fp32", "bf16"), ("plain", "merge", "survive", "guard", "reset"), (4, 8, 12)
WORDS = ("refusal", "disagreement")


def jobs(engines):
    return [f"{engine}:{dtype}:{kind}" for engine in engines for dtype in DTYPES for kind in kinds(engine)]


def kinds(engine):
    """A flat parameter has no moments of a factor's own: such a run is refused, as test_adapters_writers says."""
    return KINDS if engine != "fsdp1flat" else tuple(kind for kind in KINDS if kind != "reset")


def train_beside_one_process(world, out, work, alone, seconds=540):
    """Jobs in two processes, and beside them jobs in a single one, in which nothing is distributed."""
    with (
        started(2, engine_runs.main, world.folder, out, *work) as two,
        started(1, engine_runs.main, world.folder, out, *alone) as one,
    ):
        finish(one, seconds)
        finish(two, seconds)


def read(out, engine, dtype, kind, rank=0):
    return torch.load(out / f"{engine}-{dtype}-{kind}-rank{rank}.pt")


def same_bits(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(x, y)
        for step, modules in left.items()
        for name, pair in modules.items()
        for x, y in zip(pair, right[step][name], strict=True)
    )


def distances(left, right):
    """The relative distance of each module's update B·A at each step."""
    return [
        float((B.double() @ A.double() - D.double() @ C.double()).norm() / (D.double() @ C.double()).norm())
        for step, modules in left.items()
        for (A, B), (C, D) in zip(modules.values(), right[step].values(), strict=True)
    ]


def furthest(left, right):
    return max(distances(left, right))


def merged(run):
    """The modules that each event chose to merge."""
    return {step: [n for n, (merge, _) in found.items() if merge] for step, found in run["decisions"].items()}


def check_equal_to_one_process(out, engine, dtype, start=""):
    mine, alone = ({k: read(out, e, dtype, k + start) for k in ("plain", "merge")} for e in (engine, "single"))
    assert tuple(merged(mine["merge"])) == EVENTS
    assert merged(mine["merge"]) == merged(alone["merge"])
    own, edited = (furthest(mine[kind]["steps"], alone[kind]["steps"]) for kind in ("plain", "merge"))
    print(f"{dtype} {engine}: {own:.1e} from one process without merges, {edited:.1e} with")
    # In bf16 other weights round otherwise, by a few percent of that.
    assert edited <= 1.05 * own
    # The merges are no small thing beside that.
    if dtype == "fp32":
        assert furthest(mine["merge"]["steps"], mine["plain"]["steps"]) > 1e4 * own


def check_the_edits_are_exact(world, run):
    """To the bit: what this process decides and computes from the factors that the engine had is what it then has."""
    safety, subspace = load_adapter(world.safety), Subspace.load(world.subspace)
    began = {name: LowRank(*pair) for name, pair in run["initial"].items()}
    assert tuple(run["before"]) == EVENTS
    for step, before in run["before"].items():
        factors = {name: LoraFactors(name, *pair, 2.0, initial=began.get(name)) for name, pair in before.items()}
        readings = measure(factors, subspace)
        plan = MergePlan.decide(readings, gate="num_layers", num_layers=2, weights=(0.7, 0.3))
        assert {n: (plan.verdicts[n].merge, r.cosine) for n, r in readings.items()} == run["decisions"][step]
        new, _ = merged_factors(plan, factors, safety)
        assert same_bits({step: {**before, **new}}, {step: run["steps"][step]})


def check_ranks_agree(out, engine, dtype, trainings):
    for kind in trainings:
        mine, other = (read(out, engine, dtype, kind, rank) for rank in (0, 1))
        assert same_bits(mine["steps"], other["steps"])
        assert mine["decisions"] == other["decisions"]
        assert [mine["seen"].get(k) for k in WORDS] == [other["seen"].get(k) for k in WORDS]


def check_survival(out, engine, dtype):
    """B was next to nothing and became 0.25 everywhere: visible at once, and there after the next step."""
    run = read(out, engine, dtype, "survive")
    assert run["seen"]["before"] < 0.01
    assert torch.equal(run["seen"]["visible"], torch.full_like(run["seen"]["visible"], 0.25))
    for _, B in run["steps"][3].values():
        assert 0 < float((B - 0.25).abs().max()) < 2e-3
    assert "1 modules, the first is 'layers." in run["seen"]["refusal"]
    assert "(on rank 1 of 2)" in run["seen"]["refusal"]
    assert "the merge plan must be the same on all 2 ranks, and is '1 modules" in run["seen"]["disagreement"]
    assert "on rank 0; '0 modules" in run["seen"]["disagreement"]


def check_the_callback_does_as_the_verbs(out, engine, dtype):
    """To the bit, with one journal, written by rank 0; and its policy for moments reaches the engine's own."""
    guard, merge = (read(out, engine, dtype, kind) for kind in ("guard", "merge"))
    check_the_same_until_it_stops(guard, merge)
    guard = guard["steps"]
    entries = journal(out, engine, dtype, "guard")
    assert [e["kind"] for e in entries] == ["start", *["check", "merge"] * 2, "end"]
    selected = {e["step"]: [m["name"] for m in e["modules"]] for e in entries if e["kind"] == "merge"}
    assert selected == {step: merged(merge)[step] for step in (4, 8)}
    if "reset" not in kinds(engine):
        return
    reset = read(out, engine, dtype, "reset")["steps"]
    assert same_bits({4: reset[4]}, {4: guard[4]})
    moved = [n for n in reset[5] if not all(torch.equal(x, y) for x, y in zip(reset[5][n], guard[5][n], strict=True))]
    assert set(moved) == set(selected[4])
    assert not [e for e in journal(out, engine, dtype, "reset") if e["kind"] == "error"]


def check_the_same_until_it_stops(guard, merge):
    """To the bit, through two merges and the steps between: the loop's own verbs go on to a third."""
    last = engine_runs.STOPS["guard"]
    assert max(guard["steps"]) == last
    assert same_bits(guard["steps"], {step: factors for step, factors in merge["steps"].items() if step <= last})


def journal(out, engine, dtype, kind):
    text = (out / f"{engine}:{dtype}:{kind}" / "safemerge.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def check_engines_agree(out, engines, dtype):
    """Where two engines train alike to the bit, they merge alike to the bit; returns how many pairs do."""
    runs = {e: {k: read(out, e, dtype, k)["steps"] for k in ("plain", "merge", "survive")} for e in engines}
    pairs = [(x, y) for i, x in enumerate(engines) for y in engines[i + 1 :]]
    alike = [(x, y) for x, y in pairs if same_bits(runs[x]["plain"], runs[y]["plain"])]
    for x, y in alike:
        assert same_bits(runs[x]["merge"], runs[y]["merge"]), (x, y)
        assert same_bits(runs[x]["survive"], runs[y]["survive"]), (x, y)
    return alike


TORCH = ("ddp", "fsdp1", "fsdp1flat", "fsdp2")
DEEPSPEED = ("zero0", "zero1", "zero2", "zero3")


def skip_without_its_package(engine):
    if engine in DEEPSPEED and not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed: pip install 'safemerge-callback[engines]'")


@pytest.mark.parametrize("engines", [TORCH, DEEPSPEED], ids=["torch", "deepspeed"])
def test_every_engine_trains_merges_and_keeps_the_edits(world, tmp_path, engines):
    skip_without_its_package(engines[0])
    train_beside_one_process(world, tmp_path, jobs(engines), jobs(("single",)))
    for engine in engines:
        for dtype in DTYPES:
            check_ranks_agree(tmp_path, engine, dtype, kinds(engine))
            check_the_edits_are_exact(world, read(tmp_path, engine, dtype, "merge"))
            check_equal_to_one_process(tmp_path, engine, dtype)
            check_survival(tmp_path, engine, dtype)
            check_the_callback_does_as_the_verbs(tmp_path, engine, dtype)
    alike = {dtype: check_engines_agree(tmp_path, engines, dtype) for dtype in DTYPES}
    expected = {TORCH: (6, 1), DEEPSPEED: (3, 1)}[engines]
    assert tuple(map(len, alike.values())) == expected, alike


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_pissa_merges_as_in_one_process(world, tmp_path, engine):
    """Its factors began as a part of the base weight, so a merge weighs what has changed since, on every rank."""
    skip_without_its_package(engine)
    trainings = [f"{kind}+pissa" for kind in ("plain", "merge", "guard")]
    for e, processes in (("single", 1), (engine, 2)):
        work = [f"{e}:fp32:{kind}" for kind in trainings]
        run_on(processes, engine_runs.main, world.folder, tmp_path, *work)
    check_ranks_agree(tmp_path, engine, "fp32", trainings)
    check_equal_to_one_process(tmp_path, engine, "fp32", "+pissa")
    guard, merge = (read(tmp_path, engine, "fp32", f"{kind}+pissa") for kind in ("guard", "merge"))
    check_the_edits_are_exact(world, merge)
    assert len(merge["initial"]) == 4
    check_the_same_until_it_stops(guard, merge)


ORDERS = range(3, 13)


def closest(world, run):
    """The smallest 1 - σ₅/σ₄ of the sums that were cut to rank 4; a difference grows by up to its inverse there."""
    safety = load_adapter(world.safety).factors
    sums = [
        0.7 * B.double() @ A.double() + 0.3 * safety[n].scaling / 2.0 * safety[n].B.double() @ safety[n].A.double()
        for step, chosen in merged(run).items()
        for n, (A, B) in run["before"][step].items()
        if n in chosen
    ]
    return min(1 - float(values[4] / values[3]) for values in map(torch.linalg.svdvals, sums))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_over_ten_orders_of_the_data_merges_add_no_distance(world, tmp_path, engine):
    """One order is one draw of rounding: the typical distance, a root mean square, in the median of ten orders."""
    skip_without_its_package(engine)
    work = {
        e: [f"{e}:fp32:{kind}:{order}" for order in ORDERS for kind in ("plain", "merge")] for e in (engine, "single")
    }
    train_beside_one_process(world, tmp_path, work[engine], work["single"], 1500)
    found = []
    for order in ORDERS:
        mine, alone = (
            {kind: read(tmp_path, e, "fp32", f"{kind}-{order}") for kind in ("plain", "merge")}
            for e in (engine, "single")
        )
        check_the_edits_are_exact(world, mine["merge"])
        own, edited = (distances(mine[kind]["steps"], alone[kind]["steps"]) for kind in ("plain", "merge"))
        found.append([math.sqrt(sum(x * x for x in each) / len(each)) for each in (own, edited)])
        rms, largest = (f"{x:.1e} without merges and {y:.1e} with" for x, y in (found[-1], (max(own), max(edited))))
        print(f"{engine}, order {order}: {rms}; largest {largest}; σ₅ {closest(world, mine['merge']):.1%} below σ₄")
    own, edited = (statistics.median(column) for column in zip(*found, strict=True))
    print(f"{engine}, median of {len(found)} orders: without merges {own:.1e}, with {edited:.1e}")
    assert edited <= own
