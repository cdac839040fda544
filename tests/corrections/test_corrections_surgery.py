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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
@pytest.mark.parametrize("which", ["task", "safety", "both"])
def test_the_size_of_the_gradients_does_not_matter(scale, which, dtype):
    safety = gradients(0)
    task = [g - 2 * h for g, h in zip(gradients(1), safety, strict=True)]
    scales = {name: scale if which in (name, "both") else 1.0 for name in ("task", "safety")}
    g, h = (
        [scales[name] * part.to(dtype) for part in parts] for name, parts in {"task": task, "safety": safety}.items()
    )
    exact = flat(g) - min(0.0, float(flat(g) @ flat(h))) / float(flat(h) @ flat(h)) * flat(h)
    near = 1e-5 if dtype is torch.float32 else 1e-2
    assert float((flat(without_conflict(g, h)) - exact).norm() / exact.norm()) < near
    most = min(0.5 * float(flat(g).norm()), float(flat(h).norm()))
    assert float(flat(bounded(h, g, 0.5)).norm()) == pytest.approx(most, rel=near)
    assert all(part.dtype == dtype for part in [*without_conflict(g, h), *bounded(h, g, 0.5)])
