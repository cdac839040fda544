"""Two gradients into one."""

import pytest
import torch

from safemerge_callback.corrections.surgery import bounded, without_conflict


def gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)]


def flat(gradient):
    return torch.cat([g.double().flatten() for g in gradient])


def test_what_goes_against_the_safety_gradient_is_taken_away():
    safety = gradients(0)
    against = [g - 2 * h for g, h in zip(gradients(1), safety, strict=True)]
    assert flat(against) @ flat(safety) < 0
    assert abs(float(flat(without_conflict(against, safety)) @ flat(safety))) < 1e-4
    along = [g + 2 * h for g, h in zip(gradients(1), safety, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(without_conflict(along, safety), along, strict=True))


def test_without_a_safety_gradient_the_tasks_is_untouched():
    task, nothing = gradients(0), [torch.zeros(4, 3), torch.zeros(5)]
    assert all(torch.equal(a, b) for a, b in zip(without_conflict(task, nothing), task, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bounded(nothing, task, 0.5), nothing, strict=True))


@pytest.mark.parametrize("share", [0.1, 0.5, 100.0])
def test_the_safety_gradient_is_bounded_by_a_share_of_the_tasks(share):
    safety, task = gradients(0), gradients(1)
    norm, most = float(flat(bounded(safety, task, share)).norm()), share * float(flat(task).norm())
    assert norm == pytest.approx(min(most, float(flat(safety).norm())), rel=1e-5)
