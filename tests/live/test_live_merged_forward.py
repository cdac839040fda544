"""A model that computes a merge without one being made equals the merge that is made, in float64."""

import pytest
import torch
from torch import nn

from safemerge_callback.errors import AdapterError
from safemerge_callback.live.merged_forward import merged_forward
from safemerge_callback.live.modules import live_factors, lora_modules
from safemerge_callback.methods import get_method
from safemerge_callback.ops import LowRank
from tests.support.world import odd_model, with_lora

TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])


class Words(nn.Module):
    """An embedding and a map, which a LoRA adapts both."""

    def __init__(self):
        super().__init__()
        self.wte, self.head = nn.Embedding(12, 6), nn.Linear(6, 5, bias=False)

    def forward(self, ids):
        return self.head(self.wte(ids))


def updates(factors, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: ((rank, one.d_in), (one.d_out, rank)) for name, one in factors.items()}
    return {
        name: LowRank(*(torch.randn(s, generator=generator, dtype=torch.float64) for s in pair))
        for name, pair in shapes.items()
    }


def written(model, weights, others):
    """Put the real merge's factors, of rank Σ r, beside the base: method `cat`, and `pull` without others."""
    for name, live in live_factors(model).items():
        mine = LowRank(live.A.detach(), live.B.detach())
        rest = [LowRank(other[name].A, other[name].B / live.scaling) for other in others]
        merged = get_method("cat" if rest else "pull").merge(mine, rest, weights=weights[name], space="delta")
        at = lora_modules(model)[name]
        for place, tensor in ((at.A, merged.A), (at.B, merged.B)):
            parameter = getattr(place.module, place.attribute)
            parameter.data = tensor
    return model


@pytest.mark.parametrize("make", ["linear", "embedding"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_forward_pass_is_that_of_the_merge_that_is_made(make, count):
    if make == "linear":
        model, inputs = odd_model().double(), torch.randn(4, 7, dtype=torch.float64)
    else:
        model, inputs = with_lora(Words(), ["wte", "head"], r=3, init_lora_weights=False).double(), TOKENS
    factors = live_factors(model)
    others = [updates(factors, rank=2 + k, seed=k) for k in range(count)]
    weights = {name: [0.3 + 0.1 * i, *([0.7, -0.4][:count])] for i, name in enumerate(factors)}
    plain = model(inputs)
    with merged_forward(model, others, weights):
        merged = model(inputs)
    assert torch.equal(model(inputs), plain)
    assert (merged - plain).abs().max() > 1e-3
    assert torch.allclose(merged, written(model, weights, others)(inputs), rtol=1e-10, atol=1e-12)


def test_weights_of_nothing_but_the_live_update_change_no_bit():
    model, inputs = odd_model(), torch.randn(4, 7)
    others = [{name: LowRank(*(t.float() for t in one)) for name, one in updates(live_factors(model), 2, 0).items()}]
    with merged_forward(model, others, dict.fromkeys(live_factors(model), (1.0, 0.0))):
        same = model(inputs)
    assert torch.equal(same, model(inputs))


def test_a_weight_has_the_gradient_that_differences_have():
    model, inputs = odd_model().double(), torch.randn(4, 7, dtype=torch.float64)
    others = [updates(live_factors(model), 2, 1)]

    def loss(weights):
        with merged_forward(model, others, dict(zip(live_factors(model), weights, strict=True))):
            return model(inputs).tanh().sum()

    weights = torch.tensor([[0.6, 0.4], [0.1, 0.9]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, weights)


def test_what_cannot_be_weighed_is_refused_and_nothing_is_left_behind():
    model = odd_model()
    scalings = [dict(layer.scaling) for layer in model.modules() if hasattr(layer, "scaling")]
    with (
        pytest.raises(AdapterError, match="'nosuch' is none of the 2"),
        merged_forward(model, [], {"0": (0.5,), "nosuch": (1.0,)}),
    ):
        pass
    assert scalings == [dict(layer.scaling) for layer in model.modules() if hasattr(layer, "scaling")]
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the base"), merged_forward(model, [], {"0": (0.5,)}):
        pass
