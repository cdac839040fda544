"""How a term's own gradient joins the task's, and what is said of the two, in one process and against float64."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from safemerge_callback.corrections.gradient import GradientEngine, way_for
from safemerge_callback.corrections.protocol import RunPoint
from safemerge_callback.corrections.schedule import Schedule
from safemerge_callback.errors import ConfigError
from safemerge_callback.live.micro_batch import micro_batch
from safemerge_callback.record.log import Log

AT = RunPoint(0, 10, cast(Any, None), cast(Any, None))


class Toward:
    """Half the square of the distance of all weights from a number."""

    def __init__(self, name, number, weight=1.0):
        self.name, self.number, self.weight, self.schedule = name, number, weight, Schedule()

    def loss(self, at, model):
        return sum(((p - self.number) ** 2).sum() for p in model.parameters()) / 2


class TowardApart(Toward):
    def combine(self, task, own):
        self.shapes = [x.shape for x in task], [x.shape for x in own]
        return [3 * o - t for t, o in zip(task, own, strict=True)]


class Lines(Log):
    """What would be in the journal."""

    def __init__(self):
        super().__init__(quiet=True)
        self.entries = []

    def note(self, entry):
        self.entries.append(entry)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))


def task(model):
    (torch.arange(3.0) @ model[0].weight.T).square().sum().backward()


def flat(gradients):
    return torch.cat([g.double().flatten() for g in gradients])


def of_the_task(model):
    """The task's gradient, of what it trains."""
    task(model)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return gradients


def step(model, terms, clip=None):
    """One step's gradients by the engine, and what it then says of the terms."""
    log = Lines()
    engine = GradientEngine(terms, micro_batch(model), log)
    engine.before_step(AT, measured=True)
    task(model)
    norm = None if clip is None else float(nn.utils.clip_grad_norm_(model.parameters(), clip))
    engine.before_update(1)
    numbers = engine.report(1, norm)
    return [p.grad.clone() for p in model.parameters()], numbers, log


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_norms_and_cosines_of_two_terms(model, clip):
    """Whatever the clipping: each term's own gradient, and the task's without either."""
    own = {n: w * flat([p - x for p in model.parameters()]).detach() for n, x, w in (("a", 1, 0.5), ("b", -2, 2.0))}
    alone = flat(of_the_task(model))
    _, numbers, _ = step(model, [Toward("a", 1, 0.5), Toward("b", -2, 2.0)], clip)
    for name, gradient in own.items():
        assert numbers[f"safemerge/corrections/{name}/norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
        cosine = float(gradient @ alone / (gradient.norm() * alone.norm()))
        assert numbers[f"safemerge/corrections/{name}/cosine"] == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_there_is_no_cosine_to_a_task_without_a_gradient(model, clip):
    """What rounding leaves of the sum of two terms is not taken for the task's."""
    log = Lines()
    engine = GradientEngine([Toward("a", 1, 0.7), Toward("b", -2, 1.3)], micro_batch(model), log)
    engine.before_step(AT, measured=True)
    norm = None if clip is None else float(nn.utils.clip_grad_norm_(model.parameters(), clip))
    engine.before_update(1)
    numbers = engine.report(1, norm)
    assert numbers["safemerge/corrections/a/norm"] > 0
    assert not [name for name in numbers if name.endswith("/cosine")]


def test_one_that_is_kept_apart_joins_after_clipping(model):
    """Of parameters without a gradient of the task's, too; and it comes before those that are simply added."""
    alone, own = of_the_task(model), [(p - 1).detach() for p in model.parameters()]
    apart = TowardApart("apart", 1)
    gradients, numbers, _ = step(model, [Toward("added", 0, 0.5), apart], 0.5)
    added = [0.5 * p.detach() for p in model.parameters()]
    whole = [t + a for t, a in zip(alone, added, strict=True)]
    cut = 0.5 / float(flat(whole).norm())
    for gradient, t, o in zip(gradients, whole, own, strict=True):
        assert torch.allclose(gradient, 3 * o - cut * t, atol=1e-5)
    assert apart.shapes == ([p.shape for p in model.parameters()],) * 2
    cosine = float(flat(own) @ flat(alone) / (flat(own).norm() * flat(alone).norm()))
    assert numbers["safemerge/corrections/apart/cosine"] == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize(
    ("combine", "says"),
    [
        (lambda task, own: task[:1], "combined gradients of 3 tensors into 1 or into other shapes"),
        (lambda task, own: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_rule_that_fails_leaves_the_tasks_gradient(model, combine, says):
    alone, apart = of_the_task(model), TowardApart("apart", 1)
    apart.combine = combine
    model.zero_grad()
    with pytest.warns(UserWarning, match="apart could not join its gradient at step 1, training goes on"):
        _, _, log = step(model, [Toward("added", 0, 1e-9), apart])
    assert says in log.entries[0]["error"]
    for p, gradient in zip(model.parameters(), alone, strict=True):
        assert torch.allclose(p.grad, gradient, atol=1e-6)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_dropped_and_told_once(model, number, recwarn):
    """The step is as without it, another term's gradient stays, and the good steps alone are in the mean."""
    log, bad = Lines(), Toward("bad", 1)
    engine = GradientEngine([Toward("good", 1, 0.5), bad], micro_batch(model), log)
    for n, value in enumerate((1.0, number, number, 2.0)):
        bad.number = value
        model.zero_grad()
        engine.before_step(RunPoint(n, 10, cast(Any, None), cast(Any, None)))
        wanted = [0.5 * (p - 1) + (p - value if value == value and value < 10 else 0) for p in model.parameters()]
        assert all(torch.allclose(p.grad, w) for p, w in zip(model.parameters(), wanted, strict=True))
    numbers = engine.report(4)
    assert [w.message.args[0] for w in recwarn] == [
        f"safemerge: bad failed at step 2, which goes without its gradient: its loss is {number}"
    ]
    assert [(e["kind"], e["step"]) for e in log.entries[:2]] == [("error", 2), ("error", 3)]
    steps = {e["correction"]: e["steps"] for e in log.entries[2:]}
    assert steps == {"good": 4, "bad": 2}
    mean = sum(float(bad.loss(None, model)) for bad.number in (1.0, 2.0)) / 2
    assert numbers["safemerge/corrections/bad/loss"] == pytest.approx(mean)
    assert not engine.untold


def test_a_term_is_told_its_loss_and_asked_for_its_figures(model):
    class Curious(Toward):
        def observe(self, step, loss):
            self.seen = {step: loss}

        def figures(self):
            return {"rows": 2.0, "odd": float("nan")}

    term = Curious("curious", 1)
    _, numbers, log = step(model, [term])
    assert term.seen == {1: pytest.approx(float(term.loss(None, model)))}
    assert numbers["safemerge/corrections/curious/rows"] == 2.0
    assert "safemerge/corrections/curious/odd" not in numbers
    assert log.entries[0]["figures"]["rows"] == 2.0
    assert log.entries[0]["seconds"] > 0


@pytest.mark.parametrize("method", ["observe", "figures"])
def test_what_a_term_says_of_itself_may_fail(model, method):
    term = Toward("odd", 1)
    term.observe = lambda step, loss: None
    term.figures = dict
    setattr(term, method, lambda *about: 1 / 0)
    with pytest.warns(UserWarning, match="odd could not .* at step 1, training goes on: ZeroDivisionError"):
        _, numbers, _ = step(model, [term])
    assert "safemerge/corrections/odd/loss" in numbers


def test_a_gradient_kept_apart_is_refused_under_a_scaler(model):
    optimizer = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    way_for([Toward("added", 1)], model, optimizer)
    with pytest.raises(ConfigError, match=r"'apart' keeps its gradient apart .* fp16's scaler .* train in bf16"):
        way_for([Toward("added", 1), TowardApart("apart", 1)], model, optimizer)
    assert way_for([], model) is None
