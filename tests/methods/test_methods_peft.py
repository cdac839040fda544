"""Every combination of PEFT's `add_weighted_adapter`, against ours; and where PEFT itself is wrong."""

import math

import peft
import pytest
import torch
from packaging.version import Version
from peft.utils import merge_utils

from safemerge_callback.methods import get_method, spaces
from safemerge_callback.ops import LowRank, refit_dense, truncate, weighted_sum
from tests.support.versions import above_bound

NEW = pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="peft 0.21 changed its scaling")
PRUNING = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def two_adapters(tiny_llama, dtype=torch.float32, ranks=(4, 4), alphas=(4, 4), **knobs):
    """A PeftModel with two random LoRA adapters on one module, `task` and `safety`; scaling 1 unless told."""

    def config(i):
        modules = r"model\.layers\.0\.self_attn\.q_proj"
        return peft.LoraConfig(r=ranks[i], lora_alpha=alphas[i], target_modules=modules, **knobs)

    model = peft.get_peft_model(tiny_llama().to(dtype), config(0), adapter_name="task", autocast_adapter_dtype=False)
    model.add_adapter("safety", config(1), autocast_adapter_dtype=False)
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator(i), dtype=dtype)
    return model, next(m for m in model.modules() if hasattr(m, "lora_A") and "task" in m.lora_A)


def factors(layer, adapter):
    return LowRank(layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach())


def ours(layer, name, space, weights, **knobs):
    if "generator" in get_method(name).takes:
        knobs["generator"] = generator(7)
    return get_method(name).merge(
        factors(layer, "task"), [factors(layer, "safety")], weights=weights, space=space, density=0.5, **knobs
    )


def theirs(model, layer, combination, weights, **knobs):
    """PEFT's merged factors; torch's own generator is seeded after PEFT has drawn the new adapter's first values."""
    lora = model.base_model
    for step in ("_generalized_task_arithmetic_weighted_adapter", "_svd_generalized_task_arithmetic_weighted_adapter"):
        setattr(lora, step, seeded(getattr(lora, step)))
    model.add_weighted_adapter(
        ["task", "safety"], list(weights), "merged", combination_type=combination, density=0.5, svd_rank=4, **knobs
    )
    return factors(layer, "merged")


def seeded(function):
    def call(*args, **kwargs):
        torch.manual_seed(7)
        return function(*args, **kwargs)

    return call


@NEW
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("weights", [(0.25, 0.5), (0.8, 0.2), (1.0, -0.4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["linear", *PRUNING])
def test_factor_space_is_peft_to_the_bit(tiny_llama, name, dtype, weights, majority):
    """Random masks too, since both draw from a generator of one seed, in one order."""
    model, layer = two_adapters(tiny_llama, dtype)
    got = ours(layer, name, "factor", weights, majority_sign_method=majority)
    want = theirs(model, layer, name, weights, majority_sign_method=majority)
    assert got.A.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(got.A, want.A)
        assert torch.equal(got.B, want.B)
    else:  # PEFT rounds its weights to float32, whatever the factors are.
        torch.testing.assert_close(got.A, want.A, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(got.B, want.B, rtol=1e-6, atol=1e-7)


@NEW
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("name", PRUNING)
def test_delta_space_is_pefts_svd_form(tiny_llama, name, majority, monkeypatch):
    """The dense matrix to the bit, and its best approximation of rank 4 up to rounding."""
    dense = []

    def spy(live, target):
        dense.append(target)
        return refit_dense(live, target)

    monkeypatch.setattr(spaces, "refit_dense", spy)
    model, layer = two_adapters(tiny_llama)
    got = ours(layer, name, "delta", (0.8, 0.2), majority_sign_method=majority)
    torch.manual_seed(7)
    elects = {"majority_sign_method": majority} if name.endswith("ties") else {}
    deltas = [layer.get_delta_weight(adapter).detach() for adapter in ("task", "safety")]
    assert torch.equal(dense[0], getattr(merge_utils, name)(deltas, torch.tensor([0.8, 0.2]), 0.5, **elects))
    want = theirs(model, layer, f"{name}_svd", (0.8, 0.2), majority_sign_method=majority)
    assert float((got.B @ got.A - want.B @ want.A).norm() / (want.B @ want.A).norm()) < 1e-5
    lost = (dense[0] - want.B @ want.A).norm() / dense[0].norm()
    assert float(got.residual) == pytest.approx(float(lost), abs=1e-5)


@NEW
@pytest.mark.parametrize("name", PRUNING)
def test_one_scaling_that_is_not_one_changes_nothing(tiny_llama, name):
    """In the live adapter's units: times its scaling, our product is PEFT's, whose new adapter has scaling 1."""
    model, layer = two_adapters(tiny_llama, alphas=(8, 8))
    got = ours(layer, name, "factor", (0.8, 0.2))
    want = theirs(model, layer, name, (0.8, 0.2))
    torch.testing.assert_close(layer.scaling["task"] * got.B @ got.A, want.B @ want.A, rtol=1e-5, atol=1e-5)


@NEW
@pytest.mark.parametrize("space", ["factor", "delta"])
@pytest.mark.parametrize("name", ["linear", *PRUNING])
def test_scalings_that_differ_part_us_where_a_sign_is_elected_among_factors(tiny_llama, name, space):
    """PEFT elects among the factors as they are and scales afterwards; here they are in one unit before."""
    model, layer = two_adapters(tiny_llama, alphas=(8, 12))
    in_unit = factors(layer, "safety")
    root = math.sqrt(layer.scaling["safety"] / layer.scaling["task"])
    knobs = {"generator": generator(7)} if "generator" in get_method(name).takes else {}
    got = get_method(name).merge(
        factors(layer, "task"),
        [LowRank(root * in_unit.A, root * in_unit.B)],
        weights=(0.8, 0.2),
        space=space,
        density=0.5,
        **knobs,
    )
    combination = {"factor": name, "delta": "svd" if name == "linear" else f"{name}_svd"}[space]
    want = theirs(model, layer, combination, (0.8, 0.2))
    product = want.B @ want.A
    apart = float((layer.scaling["task"] * got.B @ got.A - product).norm() / product.norm())
    elects = space == "factor" and name.endswith("ties")
    assert apart > 0.01 if elects else apart < 1e-5


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_random_masks_are_pefts_in_distribution(name):
    """Mean and variance of each entry over many draws, with streams that have nothing in common."""
    above_bound("peft", "what dare keeps is scaled")
    n, x = 4000, [torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[-2.0, 1.0, 3.0]])]
    live, other = (LowRank(torch.eye(3), t @ torch.eye(3)) for t in x)
    g = generator(1)
    mine = torch.stack(
        [
            get_method(name).merge(live, [other], weights=(0.8, 0.2), space="factor", density=0.3, generator=g).B
            for _ in range(n)
        ]
    )
    torch.manual_seed(2)
    roots = torch.tensor([math.sqrt(0.8), math.sqrt(0.2)])
    peft_merge = getattr(merge_utils, name)
    want = torch.stack([peft_merge(x, roots, 0.3) for _ in range(n)])
    spread = want.std(0) / math.sqrt(n)
    assert ((mine.mean(0) - want.mean(0)).abs() < 6 * spread).all()
    assert ((mine.std(0) / want.std(0) - 1).abs() < 0.1).all()


@NEW
@pytest.mark.parametrize("combination", ["linear", "svd", "cat"])
def test_peft_is_wrong_with_rslora(tiny_llama, combination):
    """Its new adapter has scaling r/√r where 1 is meant; ours is the sum itself."""
    model, layer = two_adapters(tiny_llama, use_rslora=True)
    weights = (1.0, 0.0)
    model.add_weighted_adapter(["task", "safety"], list(weights), "merged", combination_type=combination)
    true = layer.get_delta_weight("task").detach()
    wrong = layer.get_delta_weight("merged").detach()
    rank = 8 if combination == "cat" else 4
    torch.testing.assert_close(wrong, math.sqrt(rank) * true, rtol=1e-4, atol=1e-4)
    got = get_method("linear").merge(factors(layer, "task"), [factors(layer, "safety")], weights=weights)
    torch.testing.assert_close(layer.scaling["task"] * got.B @ got.A, true)


@NEW
def test_peft_cannot_load_what_it_merged_with_a_rank_pattern(tiny_llama, tmp_path):
    """The factors have rank 2, the configuration saved beside them says 4 and has no pattern."""
    model, layer = two_adapters(tiny_llama, rank_pattern={"q_proj": 2})
    model.add_weighted_adapter(["task", "safety"], [0.8, 0.2], "merged", combination_type="linear")
    assert layer.lora_A["merged"].weight.shape[0] == 2
    assert (model.peft_config["merged"].r, model.peft_config["merged"].rank_pattern) == (4, {})
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged")


def test_ties_is_not_mergekits():
    """[1, -2, 3] and [-2, 1, 3] at .8 and .2: unweighted signs are elected here, weighted ones there."""
    task, safety = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[-2.0, 1.0, 3.0]])
    live, other = LowRank(torch.eye(3), task), LowRank(torch.eye(3), safety)
    merged = get_method("ties").merge(live, [other], weights=(0.8, 0.2), space="delta", density=1.0)
    ours = (merged.B @ merged.A)[0]
    w = torch.tensor([[0.8], [0.2]])
    stack = torch.cat([task, safety])
    votes = torch.where((w * stack).sum(0) >= 0, 1.0, -1.0)
    agree = (stack.sign() == votes).float()
    mergekit = (w * stack * agree).sum(0) / (w * agree).sum(0)
    torch.testing.assert_close(ours, torch.tensor([-0.4, -1.6, 1.5]))
    torch.testing.assert_close(mergekit, torch.tensor([1.0, -2.0, 3.0]))
    assert ours[0].sign() != mergekit[0].sign()


def test_cat_and_linear_agree_with_each_other():
    live = LowRank(torch.randn(4, 20), torch.randn(12, 4))
    other = LowRank(torch.randn(3, 20), torch.randn(12, 3))
    whole = get_method("cat").merge(live, [other], weights=(0.8, 0.2))
    best, lost = truncate(weighted_sum([live, other], (0.8, 0.2)), 4)
    kept = get_method("linear").merge(live, [other], weights=(0.8, 0.2))
    torch.testing.assert_close(kept.B @ kept.A, best.B @ best.A, rtol=1e-4, atol=1e-4)
    assert float(lost) == pytest.approx(float(kept.residual))
    assert whole.A.shape == (7, 20)
