"""What a check and a merge take besides the alignment matrices: never a d_out × d_in nor a d_out × d_out block.

Blocks are those of torch's CPU allocator, so what an operator takes for itself counts too.
"""

import sys

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.hardware import allocations, extra_bytes
from benchmarks.model_shapes import Model, random_factors, random_subspace
from safemerge_callback.adapters import Adapter
from safemerge_callback.decision import MergePlan, measure
from safemerge_callback.decision.apply import merged_factors
from safemerge_callback.decision.batches import batches
from safemerge_callback.ops import Factored, Int8, LowRank, null_cosine, projected_cosine
from safemerge_callback.subspace import Subspace, build_subspace

RANK = 2
SHAPES = Model(layers=1, hidden=512, intermediate=768, kv=384).shapes()
# In float32, as small as a d_out × d_out or d_out × d_in block of any module can be; thin blocks are a tenth of it.
MATRIX = 4 * min(rows * min(rows, columns) for rows, columns in SHAPES.values())
MIB = 1 << 20


def assert_thin(work, limit=MATRIX // 2):
    """Fail where `work()` takes a block of `limit` bytes or more; by default half of the smallest matrix."""
    found = max(allocations(work))
    assert found < limit, f"a block of {found} bytes"


@pytest.fixture
def factors():
    torch.manual_seed(0)
    return random_factors(SHAPES, RANK, "cpu")


@pytest.fixture
def subspace(factors):
    """V in memory: measured once, so that every matrix is there before blocks are looked at."""
    subspace, _ = random_subspace(SHAPES, torch.float32)
    measure(factors, subspace)
    return subspace


def random_safety(rank=RANK):
    return Adapter("random", None, {}, random_factors(SHAPES, rank, "cpu"))


def plan_for(factors, subspace, gate="all", **knobs):
    return MergePlan.decide(measure(factors, subspace), gate=gate, **knobs)


def test_a_check_makes_no_matrix(factors, subspace):
    assert_thin(lambda: measure(factors, subspace))
    assert extra_bytes(lambda: measure(factors, subspace)) < MATRIX


@pytest.mark.parametrize(
    "naive",
    [
        lambda V, A, B: torch.nn.functional.cosine_similarity((B @ A).flatten(), (V @ (V.mT @ B) @ A).flatten(), 0),
        lambda V, A, B: V @ V.mT / V.norm() @ B,
        lambda V, A, B: V.double().mT @ B.double(),
        lambda V, A, B: torch.linalg.svd(B @ A, full_matrices=False),
    ],
    ids=["update", "C", "wide", "svd"],
)
def test_a_formula_that_makes_a_matrix_is_seen(naive):
    """So that the other tests can fail: the published formula and its kin, on the smallest module."""
    V, A, B = torch.randn(384, 512), torch.randn(RANK, 512), torch.randn(384, RANK)
    with pytest.raises(AssertionError, match="a block of"):
        assert_thin(lambda: naive(V, A, B))


@pytest.mark.parametrize("space", ["delta", "factor"])
def test_a_merge_makes_no_matrix(factors, subspace, space):
    plan, safety = plan_for(factors, subspace, space=space), random_safety()
    assert len(plan.selected) == 7
    assert_thin(lambda: merged_factors(plan, factors, safety))
    assert extra_bytes(lambda: merged_factors(plan, factors, safety)) < MATRIX


def test_a_projection_of_all_modules_makes_no_matrix(factors, subspace):
    plan = plan_for(factors, subspace, method="project")
    assert_thin(lambda: merged_factors(plan, factors, subspace=subspace))


def test_a_projection_of_some_modules_copies_no_matrix(factors, subspace):
    """Picked out of stacks: one of q and o, and of k, v, gate and up, whatever their order."""
    readings = measure(factors, subspace)
    for count in range(1, len(SHAPES)):
        plan = MergePlan.decide(readings, gate="num_layers", num_layers=count, method="project")
        assert len(plan.selected) == count
        assert_thin(lambda plan=plan: merged_factors(plan, factors, subspace=subspace))


# V of 8 million values: whole in float32 it takes 32 MiB, and it is widened by 16 MiB at a time.
STORED = {
    "bfloat16": lambda: torch.randn(4096, 2048).bfloat16(),
    "float16": lambda: torch.randn(4096, 2048).half(),
    "int8": lambda: Int8(torch.randint(-127, 128, (4096, 2048), dtype=torch.int8), torch.rand(4096, 1)),
    "factored": lambda: Factored(torch.randn(4096, 16).bfloat16(), torch.randn(16, 2048).bfloat16()),
}


@pytest.mark.parametrize("stored", STORED)
def test_a_narrow_matrix_is_never_widened_whole(stored):
    V, update = STORED[stored](), LowRank(torch.randn(4, 2048), torch.randn(4096, 4))
    assert_thin(lambda: projected_cosine(update, V), limit=16 * MIB + 1)
    assert_thin(lambda: null_cosine(V), limit=16 * MIB + 1)


def test_a_narrow_matrix_widened_whole_is_seen():
    V = torch.randn(4096, 2048).bfloat16()
    with pytest.raises(AssertionError, match="a block of"):
        assert_thin(lambda: V.float(), limit=16 * MIB + 1)


@pytest.fixture
def file(tmp_path):
    """A subspace file of all modules."""
    torch.manual_seed(1)
    for name in ("aligned", "unaligned"):
        (tmp_path / name).mkdir()
        tensors = {f"model.{module}.weight": torch.randn(shape) for module, shape in SHAPES.items()}
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "subspace.safetensors"
    return build_subspace(path, aligned=tmp_path / "aligned", unaligned=tmp_path / "unaligned", progress=False).path


def test_out_of_a_file_one_module_is_mapped_and_many_stay_within_the_budget(factors, file, monkeypatch):
    def largest():
        """The largest block but the file itself, which is mapped whole each time and so takes no memory."""
        blocks = allocations(lambda: measure(factors, Subspace.load(file)))
        return max(size for size in blocks if size != file.stat().st_size)

    module = sys.modules[batches.__module__]
    monkeypatch.setattr(module, "_BATCH_BYTES", 1)
    assert largest() < MATRIX // 2
    budget = 3 * MIB
    monkeypatch.setattr(module, "_BATCH_BYTES", budget)
    assert MATRIX < largest() < budget < sum(4 * rows * columns for rows, columns in SHAPES.values())
