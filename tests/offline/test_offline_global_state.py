"""Whatever the caller has set for its own arithmetic, every verb gives the figures and files that it gives without."""

import contextlib
import copy
import dataclasses
import hashlib

import peft
import pytest
import torch
import transformers

from safemerge_callback import (
    MergePlan,
    Subspace,
    apply,
    apply_safemerge,
    build_subspace,
    live_factors,
    load_adapter,
    measure,
    measure_adapter,
    merge_adapters,
    sweep_adapters,
    writer_for,
)
from safemerge_callback.adapters.snapshot import norms_of
from safemerge_callback.corrections.average import Average
from safemerge_callback.decision import as_gate
from safemerge_callback.live.optimizer import edit_optimizer_states
from safemerge_callback.methods import METHODS, get_method
from safemerge_callback.ops import LowRank
from safemerge_callback.subspace import compress_subspace

FILES = [name for name, method in METHODS.items() if not method.needs & {"average", "grams"}]
PRUNED = {name: {"density": 0.5} for name, method in METHODS.items() if "density" in method.takes}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def products(**chosen):
    backends = {"all": torch.backends, "cpu": torch.backends.mkldnn.matmul}
    for name, value in chosen.items():
        backends[name].fp32_precision = value
    try:
        yield
    finally:
        for backend in backends.values():
            backend.fp32_precision = "none"


STATES = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "products in bfloat16": lambda: products(cpu="bf16"),
    "products in TF32": lambda: products(all="tf32"),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "in a device": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


def digests(folder):
    names = [path for path in sorted(folder.rglob("*.safetensors")) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def bits(pairs):
    """(A, B) of modules as plain numbers, which no state can touch."""
    return {name: [t.detach().double().tolist() for t in pair] for name, pair in pairs.items()}


def built(world, models, out):
    file = out / "built.safetensors"
    kept = {"aligned": world / "aligned", "unaligned": world / "unaligned", "progress": False}
    build_subspace(file, target_modules=["q_proj", "v_proj", "down_proj"], **kept)
    build_subspace(out / "adapter.safetensors", alignment_adapter=world / "safety", progress=False)
    return digests(out)


def compressed(world, models, out):
    (out / "s.safetensors").write_bytes((world / "s.safetensors").read_bytes())
    compress_subspace(out / "s.safetensors", out / "int8.safetensors", progress=False)
    compress_subspace(out / "s.safetensors", out / "cut.safetensors", "truncated", 4, progress=False)
    near = measure(load_adapter(world / "task").factors, Subspace.load(out / "int8.safetensors"), gate="threshold")
    return digests(out), [dataclasses.asdict(reading) for reading in near.values()]


def measured(world, models, out):
    readings = measure_adapter(world / "task", world / "s.safetensors")
    return [dataclasses.asdict(reading) for reading in readings.values()]


def swept(world, models, out):
    made = [name for name in FILES if name not in ("cat", "project")]
    gates = [as_gate("all", {}), as_gate("threshold", {"threshold": 0.5})]
    parts = [world / "task", world / "safety", world / "s.safetensors"]
    cells = sweep_adapters(*parts, gates=gates, methods=made, density=0.5)
    return [dataclasses.asdict(cell) for cell in cells]


def baked(world, models, out):
    task, safety, matrices = world / "task", world / "safety", world / "s.safetensors"
    merge_adapters(task, safety, matrices, out / "baked", gate="all", bake=world / "aligned")
    return digests(out)


def a_loop_of_ones_own(world, models, out):
    """Measure, decide, apply, tell the optimizer, average; the live factors ask for gradients."""
    model, optimizer = models
    writer, matrices = writer_for(model), Subspace.load(world / "s.safetensors")
    average = Average(0.5)
    average.follow(writer.gather())
    plan = MergePlan.decide(measure(writer.gather(), matrices), gate="all")
    before = norms_of(writer.gather())
    edits = apply(plan, writer, load_adapter(world / "safety"), matrices)
    after = norms_of(writer.gather())
    scaled = [(p, after[n][0] / before[n][0]) for n, pair in writer.parameters(after).items() for p in pair]
    assert edit_optimizer_states(optimizer, scaled, "rescale") > 0
    average.follow(writer.gather())
    moments = {id(p): optimizer.state[p]["exp_avg"] for p, _ in scaled}
    now = {n: (f.A, f.B) for n, f in writer.gather().items()}
    assert all(p.requires_grad and not p.is_inference() for p, _ in scaled)
    return bits(now), bits(average.pairs), list(map(str, edits)), [m.tolist() for m in moments.values()]


def a_new_adapter_beside(world, models, out):
    model, _ = models
    apply_safemerge(model, world / "safety", world / "s.safetensors", gate="all", method="ties", density=0.5)
    added = live_factors(model, "safemerge")
    assert not any(t.is_inference() for f in added.values() for t in (f.A, f.B))
    return bits({name: (f.A, f.B) for name, f in added.items()})


def a_method_called_by_itself(world, models, out):
    task, safety = (load_adapter(world / name).factors for name in ("task", "other"))
    found = {}
    for name in ("linear", "ties", "slerp", "pcb"):
        key, live = next(iter(task.items()))
        pair = [LowRank(live.A, live.B), [LowRank(safety[key].A, safety[key].B)]]
        done = get_method(name).function(*pair, weights=(0.7, 0.3), **PRUNED.get(name, {}))
        found[name] = (done.A, done.B)
    return bits(found)


VERBS = [built, compressed, measured, swept, baked, a_loop_of_ones_own, a_new_adapter_beside, a_method_called_by_itself]


@pytest.fixture
def models(world):
    """The live model with its adapter and an optimizer that has made a step; made in the plain state."""
    base = transformers.AutoModelForCausalLM.from_pretrained(world / "aligned")
    model = peft.PeftModel.from_pretrained(base, world / "task", is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model(input_ids=torch.arange(3, 11)[None], labels=torch.arange(3, 11)[None]).loss.backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_a_verb_gives_the_same_in_every_state(world, models, tmp_path, verb):
    def once(name, state):
        out = tmp_path / f"out {name}"
        out.mkdir()
        live = copy.deepcopy(models)
        with state:
            return verb(world, live, out)

    plain = once("plain", contextlib.nullcontext())
    others = [name for name, state in STATES.items() if once(name, state()) != plain]
    assert others == []


# The two that once leaked into a method's own arithmetic: the verbs above go through all.
FEW = ["autocast to bfloat16", "default dtype float64"]


@pytest.mark.parametrize("method", FILES)
def test_every_method_writes_the_same_bytes_in_the_two_states_that_once_leaked(world, tmp_path, method):
    safety = None if method == "project" else world / "safety"

    def once(name, state):
        with state:
            merge_adapters(
                world / "task",
                safety,
                world / "s.safetensors",
                tmp_path / f"{method} {name}",
                gate="all",
                method=method,
                **PRUNED.get(method, {}),
            )
        return digests(tmp_path / f"{method} {name}")

    plain = once("plain", contextlib.nullcontext())
    assert [name for name in FEW if once(name, STATES[name]()) != plain] == []


def test_what_the_states_would_do_to_a_product():
    """They are not idle: each of these rounds a product of float32, where the processor can."""
    x = torch.randn(64, 64)
    with STATES["autocast to bfloat16"]():
        assert not torch.equal((x @ x).float(), x.double().matmul(x.double()).float())
    with STATES["default device"](), STATES["in a device"]():
        assert torch.zeros(1).device.type == "meta"


def test_after_a_merge_an_outer_autocast_goes_on_with_the_new_values(world, models):
    """Autocast keeps the casts of weights for as long as it is open; a forward would use those of before the merge."""
    model, _ = models
    ids = torch.arange(3, 11)[None]

    def logits():
        return model(input_ids=ids).logits.detach()

    matrices = Subspace.load(world / "s.safetensors")
    writer = writer_for(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = logits()
        plan = MergePlan.decide(measure(writer.gather(), matrices), gate="all", method="pull", strength=1.0)
        apply(plan, writer, None, matrices)
        after = logits()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fresh = logits()
    assert torch.equal(after, fresh)
    assert not torch.equal(before, after)
