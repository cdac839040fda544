import peft
import pytest
import torch
from packaging.version import Version

from safemerge_callback.errors import ConfigError, PlanError
from safemerge_callback.methods import get_method
from safemerge_callback.ops import LowRank


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def two_adapters(tiny_llama, ranks=(4, 4), alphas=(8, 8), rslora=(False, False)):
    """A PeftModel with two random LoRA adapters, `task` and `safety`."""
    from peft import LoraConfig, get_peft_model

    def config(i):
        return LoraConfig(r=ranks[i], lora_alpha=alphas[i], target_modules=["q_proj", "v_proj"], use_rslora=rslora[i])

    model = get_peft_model(tiny_llama(), config(0), adapter_name="task")
    model.add_adapter("safety", config(1))
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora_" in name:
            p.data = rand(*p.shape, seed=i)
    return model


def layers(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") and "task" in m.lora_A}


def update_of(layer, adapter, unit=1.0):
    root = (layer.scaling[adapter] / unit) ** 0.5
    return LowRank(layer.lora_A[adapter].weight.detach() * root, layer.lora_B[adapter].weight.detach() * root)


PEFT = Version(peft.__version__)
# Before 0.21 the svd combination of adapters whose scaling is not 1 came out in another scaling.
SVD = pytest.param("delta", "svd", marks=pytest.mark.skipif(Version("0.21") > PEFT, reason="peft 0.21 changed it"))


@pytest.mark.parametrize(("space", "combination"), [("factor", "linear"), SVD])
@pytest.mark.parametrize("weights", [(0.8, 0.2), (0.5, 0.5), (1.0, 0.3), (0.0, 1.0)])
def test_linear_equals_peft(tiny_llama, space, combination, weights):
    model = two_adapters(tiny_llama)
    model.add_weighted_adapter(["task", "safety"], list(weights), "merged", combination_type=combination, svd_rank=4)
    for layer in layers(model).values():
        ours = get_method("linear").merge(
            update_of(layer, "task"), [update_of(layer, "safety")], weights=weights, space=space, alignment_matrix=None
        )
        theirs = layer.get_delta_weight("merged").detach()
        assert float((ours.B @ ours.A - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_rounds_once(dtype):
    """To the bit: the factors in float32 are those of float64, rounded; arithmetic in float32 adds nothing to that."""
    live, safety = (LowRank(rand(2, r, 48, seed=r).to(dtype), rand(2, 40, r, seed=r + 9).to(dtype)) for r in (4, 3))
    ours = get_method("linear").merge(live, [safety], weights=(0.7, 0.3))
    wide, other = (LowRank(update.A.double(), update.B.double()) for update in (live, safety))
    exact = get_method("linear").merge(wide, [other], weights=(0.7, 0.3))
    assert ours.A.dtype == torch.float32
    assert exact.A.dtype == torch.float64
    assert torch.equal(ours.A, exact.A.float())
    assert torch.equal(ours.B, exact.B.float())
    dense = 0.7 * live.B.double() @ live.A.double() + 0.3 * safety.B.double() @ safety.A.double()
    assert float(exact.residual[0]) == pytest.approx(float((exact.B @ exact.A - dense)[0].norm() / dense[0].norm()))


@pytest.mark.skipif(Version("0.19") > PEFT, reason="peft took no negative weights before 0.19")
def test_factor_space_with_a_negative_weight_equals_peft(tiny_llama):
    model = two_adapters(tiny_llama)
    model.add_weighted_adapter(["task", "safety"], [1.0, -0.4], "merged", combination_type="linear")
    for layer in layers(model).values():
        ours = get_method("linear").merge(
            update_of(layer, "task"), [update_of(layer, "safety")], weights=(1.0, -0.4), space="factor"
        )
        theirs = layer.get_delta_weight("merged").detach()
        assert float((ours.B @ ours.A - theirs).norm() / theirs.norm()) < 1e-5


def test_cat_equals_peft_and_the_sum(tiny_llama):
    model = two_adapters(tiny_llama, ranks=(4, 2))
    model.add_weighted_adapter(["task", "safety"], [0.8, 0.2], "merged", combination_type="cat")
    for layer in layers(model).values():
        ours = get_method("cat").merge(update_of(layer, "task"), [update_of(layer, "safety")], weights=(0.8, 0.2))
        assert ours.A.shape[-2] == 6
        theirs = layer.get_delta_weight("merged").detach()
        assert float((ours.B @ ours.A - theirs).norm() / theirs.norm()) < 1e-5


def test_factor_space_is_not_the_papers_sum(tiny_llama):
    """The cross terms are real: PEFT's linear is far from .8ΔW₁ + .2ΔW₂, ours is as near as rank 4 allows."""
    layer = next(iter(layers(two_adapters(tiny_llama)).values()))
    task, safety = update_of(layer, "task"), update_of(layer, "safety")
    target = 0.8 * task.B @ task.A + 0.2 * safety.B @ safety.A
    distance = {}
    for space in ("factor", "delta"):
        merged = get_method("linear").merge(task, [safety], weights=(0.8, 0.2), space=space)
        distance[space] = float((merged.B @ merged.A - target).norm() / target.norm())
    assert distance["factor"] > 0.5
    assert distance["delta"] < 0.3


@pytest.mark.parametrize(
    ("ranks", "alphas", "rslora"), [((4, 2), (8, 3), (True, False)), ((2, 6), (1, 16), (False, True))]
)
def test_linear_with_unequal_ranks_and_scalings(tiny_llama, ranks, alphas, rslora):
    """Against the dense sum, since PEFT's own combinations are off by √r here; in the live adapter's units."""
    for layer in layers(two_adapters(tiny_llama, ranks, alphas, rslora)).values():
        unit = layer.scaling["task"]
        live = LowRank(layer.lora_A["task"].weight.detach(), layer.lora_B["task"].weight.detach())
        merged = get_method("linear").merge(live, [update_of(layer, "safety", unit)], weights=(0.7, 0.3), space="delta")
        target = 0.7 * layer.get_delta_weight("task").detach() + 0.3 * layer.get_delta_weight("safety").detach()
        u, s, v = torch.linalg.svd(target.double())
        best = (u[:, : ranks[0]] * s[: ranks[0]]) @ v[: ranks[0]]
        ours = unit * (merged.B @ merged.A).double()
        assert float((ours - best).norm() / best.norm()) < 1e-5
        assert float(merged.residual) == pytest.approx(float((target.double() - best).norm() / target.norm()), abs=1e-5)


def test_a_merge_that_changes_nothing_is_bit_identical():
    live = LowRank(rand(3, 4, 20, seed=1), rand(3, 12, 4, seed=2))
    safety = LowRank(rand(3, 2, 20, seed=3), rand(3, 12, 2, seed=4))
    merged = get_method("linear").merge(live, [safety], weights=(1.0, 0.0), space="delta")
    assert torch.equal(merged.A, live.A)
    assert torch.equal(merged.B, live.B)
    assert not merged.residual.any()
    still = safety.B.clone()
    still[1] = 0
    merged = get_method("linear").merge(live, [LowRank(safety.A, still)], weights=(1.0, 0.5), space="delta")
    assert torch.equal(merged.B[1], live.B[1])
    assert not torch.equal(merged.B[0], live.B[0])


def test_project_keeps_A_and_equals_safe_lora():
    live, V = LowRank(rand(4, 20, seed=1), rand(12, 4, seed=2)), rand(12, 20, seed=3)
    merged = get_method("project").merge(live, [], weights=(1.0,), space="delta", alignment_matrix=V)
    C = V.double() @ V.double().T / V.double().norm()
    assert torch.equal(merged.A, live.A)
    torch.testing.assert_close(merged.B.double(), C @ live.B.double(), rtol=1e-5, atol=1e-5)


def test_errors_name_the_value_and_what_is_allowed():
    with pytest.raises(ConfigError, match=r"'linaer' is unknown.*did you mean 'linear'"):
        get_method("linaer")
    with pytest.raises(PlanError, match="alignment matrix"):
        get_method("project").merge(LowRank(rand(1, 2), rand(2, 1)), [], weights=(1.0,))
    with pytest.raises(PlanError, match=r"\[4, 2\].*space 'delta'"):
        get_method("linear").merge(
            LowRank(rand(4, 9), rand(5, 4)), [LowRank(rand(2, 9), rand(5, 2))], weights=(0.5, 0.5), space="factor"
        )
