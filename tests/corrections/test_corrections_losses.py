"""The losses on safety rows: 0, or the reference's own, at the reference; by the definition elsewhere."""

import pytest
import torch

from safemerge_callback.corrections.losses import LOSSES
from safemerge_callback.signals.reference import Reference, ReferenceRow
from safemerge_callback.signals.row_batch import RowBatch, RowOutputs

VOCABULARY, WIDTH = 11, 6
MASK = torch.tensor([[False, True, True], [True, True, True]])
TARGETS = torch.tensor([[0, 4, 5], [1, 2, 3]])
BATCH = RowBatch(torch.zeros(2, 7), torch.ones(2, 7), TARGETS, MASK)


def logits(seed):
    return 3 * torch.randn(2, 3, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def states(seed):
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))


def reference(seed=0, top_k=None):
    """What a model with these logits says of the two rows."""
    log_probs = logits(seed).log_softmax(-1)
    rows = []
    for n in range(2):
        every = log_probs[n][MASK[n]]
        loss = -float(every[range(len(every)), TARGETS[n][MASK[n]]].mean())
        if top_k is None:
            rows.append(ReferenceRow(every, None, None, states(seed)[n], loss))
        else:
            kept, tokens = every.topk(top_k)
            rest = every.scatter(-1, tokens, -torch.inf).logsumexp(-1)
            rows.append(ReferenceRow(kept, tokens, rest, states(seed)[n], loss))
    return Reference(rows)


def loss_of(name, seed, of, requires_grad=False):
    said = logits(seed).requires_grad_(requires_grad)
    return said, LOSSES[name].function(RowOutputs(said, states(seed)), BATCH, of.rows([0, 1], "cpu"))


@pytest.mark.parametrize("name", LOSSES)
def test_at_the_reference_it_is_the_references_own(name):
    of = reference()
    _, losses = loss_of(name, 0, of)
    least, spread = LOSSES[name].spread(of)
    assert losses.shape == (2,)
    assert float(losses.mean()) == pytest.approx(least, abs=1e-6)
    assert spread > 0
    assert LOSSES[name].limit(of, 2.0) == pytest.approx(least + 2 * spread)
    if name != "ce":  # whose targets are whatever they are
        assert float(loss_of(name, 1, of)[1].mean()) > least


def test_ce_is_the_mean_of_the_targets_logarithms():
    _, losses = loss_of("ce", 1, reference())
    log_probs = logits(1).double().log_softmax(-1)
    assert float(losses[0]) == pytest.approx(-float(log_probs[0, 1, 4] + log_probs[0, 2, 5]) / 2, abs=1e-6)
    assert float(losses[1]) == pytest.approx(-float(sum(log_probs[1, i, i + 1] for i in range(3))) / 3, abs=1e-6)


def test_kl_is_the_divergence_from_the_reference_and_its_gradient_the_difference_of_the_probabilities():
    said, losses = loss_of("kl", 1, reference(), requires_grad=True)
    p, q = logits(0).double().softmax(-1), logits(1).double().softmax(-1)
    divergence = (p * (p / q).log()).sum(-1)
    assert losses[0].item() == pytest.approx(float(divergence[0, 1:].mean()), abs=1e-6)
    assert losses[1].item() == pytest.approx(float(divergence[1].mean()), abs=1e-6)
    losses.mean().backward()
    wanted = (q - p) * MASK.unsqueeze(-1) / MASK.sum(-1)[:, None, None] / 2
    assert torch.allclose(said.grad.double(), wanted, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 3, VOCABULARY - 1])
def test_kl_over_the_likeliest_tokens_and_one_bin_is_never_above_the_whole(top_k):
    whole = loss_of("kl", 1, reference())[1]
    said, binned = loss_of("kl", 1, reference(top_k=top_k), requires_grad=True)
    assert (binned <= whole + 1e-6).all()
    p, q = logits(0)[1, 0].double().softmax(-1), logits(1)[1, 0].double().softmax(-1)
    if top_k == VOCABULARY - 1:
        assert torch.allclose(binned, whole, atol=1e-5)
    kept = p.topk(top_k).indices
    bins = [torch.cat([v[kept], (v.sum() - v[kept].sum()).unsqueeze(0)]) for v in (p, q)]
    binned.mean().backward()
    assert torch.isfinite(said.grad).all()
    first = float((bins[0] * (bins[0] / bins[1]).log()).sum())
    alone = reference(top_k=top_k)
    batch = BATCH._replace(targets=TARGETS[1:, :], mask=torch.tensor([[True, False, False]]))
    one = LOSSES["kl"].function(RowOutputs(logits(1)[1:], None), batch, alone.rows([1], "cpu"))
    assert float(one) == pytest.approx(first, abs=1e-5)


def test_kl_of_a_reference_that_leaves_no_probability_outside_is_finite():
    sure = torch.full((2, 3, VOCABULARY), -200.0)
    sure[..., 2] = 200.0
    rows = []
    for n in range(2):
        every = sure.log_softmax(-1)[n][MASK[n]]
        kept, tokens = every.topk(2)
        rows.append(ReferenceRow(kept, tokens, every.scatter(-1, tokens, -torch.inf).logsumexp(-1), None, 0.0))
    said, losses = loss_of("kl", 1, Reference(rows), requires_grad=True)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(said.grad).all()


def test_sbr_is_the_mean_squared_difference_of_the_states():
    _, losses = loss_of("sbr", 1, reference())
    assert torch.allclose(losses, (states(1) - states(0)).square().mean(-1))
    assert LOSSES["sbr"].hidden
    apart = float((states(0)[0] - states(0)[1]).square().mean())
    assert LOSSES["sbr"].spread(reference())[1] == pytest.approx(apart / 4, rel=1e-5)
