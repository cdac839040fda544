import pytest
import torch

from safemerge_callback.decision import MergePlan, apply, measure
from safemerge_callback.decision.apply import basis_rank, known_bases
from safemerge_callback.errors import ConfigError
from safemerge_callback.live import writer_for
from safemerge_callback.methods import How
from safemerge_callback.subspace import Subspace
from safemerge_callback.subspace.compress import compress_subspace

CASES = [
    ("llama", {}),
    ("gpt2", {"targets": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ("gemma", {"targets": ["q_proj", "v_proj", "embed_tokens"]}),
]
ORTHOGONAL = {"gate": "all", "method": "project", "operator": "orthogonal"}


def projected(case, plan, subspace=None):
    return apply(plan, writer_for(case.model), subspace=subspace or case.subspace)


@pytest.mark.parametrize(("family", "lora"), CASES)
@pytest.mark.parametrize("rank", [3, None])
def test_it_is_the_projection_on_Vs_left_vectors(make_case, family, lora, rank):
    case = make_case(family, **lora)
    before = case.updates()
    plan = MergePlan.decide(measure(writer_for(case.model).gather(), case.subspace), operator_rank=rank, **ORTHOGONAL)
    edits = projected(case, plan)
    for edit in edits:
        U, values, _ = torch.linalg.svd(case.V[edit.name])
        k = min(basis_rank(case.subspace.modules[edit.name], rank), int((values > 1e-6 * values[0]).sum()))
        want = U[:, :k] @ U[:, :k].mT @ before[edit.name]
        torch.testing.assert_close(case.updates()[edit.name], want, rtol=1e-4, atol=1e-5)
        assert edit.residual == 0
        assert plan.task_weight_of(edit.name) == 1.0
    shown = f", operator orthogonal{f', operator_rank {rank}' if rank else ''}"
    assert str(plan).splitlines()[0].endswith(shown)


def test_again_and_again_it_changes_nothing_more(make_case):
    case = make_case("llama")
    plan = MergePlan.decide(measure(writer_for(case.model).gather(), case.subspace), operator_rank=4, **ORTHOGONAL)
    first = projected(case, plan)
    once = case.updates()
    second = projected(case, plan)
    assert min(edit.change for edit in first) > 0.5
    assert max(edit.change for edit in second) < 1e-5
    for name, update in case.updates().items():
        torch.testing.assert_close(update, once[name], rtol=1e-5, atol=1e-6)


def test_each_basis_is_found_once_and_kept_thin(make_case, monkeypatch):
    case = make_case("llama", targets=["q_proj", "v_proj"])
    plan = MergePlan.decide(measure(writer_for(case.model).gather(), case.subspace), operator_rank=4, **ORTHOGONAL)
    projected(case, plan)
    kept = known_bases(case.subspace)
    assert {U.shape[1] for U in kept.values()} == {4}
    assert len(kept) == len(plan.selected)
    monkeypatch.setattr(Subspace, "stacks", lambda *_: pytest.fail("V was read again"))
    projected(case, plan)


def test_a_compressed_file_projects_on_the_exact_one(make_case, tmp_path):
    case = make_case("llama", targets=["q_proj", "v_proj"])
    near = compress_subspace(case.subspace, tmp_path / "near.safetensors", progress=False)
    before = case.updates()
    plan = MergePlan.decide(measure(writer_for(case.model).gather(), near), operator_rank=4, **ORTHOGONAL)
    projected(case, plan, near)
    for name in plan.selected:
        U = torch.linalg.svd(case.V[name]).U[:, :4]
        torch.testing.assert_close(case.updates()[name], U @ U.mT @ before[name], rtol=1e-4, atol=1e-5)


def test_the_rank_follows_the_noted_spectrum(make_case):
    header = next(iter(make_case("llama").subspace.modules.values()))
    header.energy.update({"1": 0.2, "2": 0.5, "4": 0.91, "8": 0.95})
    assert basis_rank(header, None) == 4
    assert basis_rank(header, 7) == 7
    header.energy.clear()
    assert basis_rank(header, None) == min(64, *header.shape)


def test_knobs_of_the_operator():
    def knobs(method, operator, rank):
        return How(method, knobs={"operator": operator, "operator_rank": rank}).knobs

    assert knobs("project", None, None) == {"operator": "safelora", "operator_rank": None}
    assert knobs("project", "orthogonal", 3) == {"operator": "orthogonal", "operator_rank": 3}
    assert knobs("linear", None, None) == {}
    for method, operator, rank, says in [
        ("linear", "safelora", None, "operator is 'safelora', which method 'linear' does not read"),
        ("linear", None, 3, "operator_rank is 3, which method 'linear' does not read"),
        ("project", "ortogonal", None, "did you mean 'orthogonal'"),
        ("project", "safelora", 3, "operator_rank is 3, which operator 'safelora' does not read"),
        ("project", "orthogonal", True, "operator_rank is True"),
    ]:
        with pytest.raises(ConfigError, match=says):
            knobs(method, operator, rank)
