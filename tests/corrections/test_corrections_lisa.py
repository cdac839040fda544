"""`lisa`: the proximal point in closed form, the fixed point of two quadratics, and blocks in real trainings."""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import TrainerCallback

from safemerge_callback import SafeMergeCallback
from safemerge_callback.adapters import LoraFactors
from safemerge_callback.corrections.lisa import ANCHOR_FILE, Blocks, Lisa, LisaSettings
from safemerge_callback.corrections.protocol import RunPoint
from safemerge_callback.corrections.proximal import proximal_point
from safemerge_callback.corrections.replay import ReplaySettings, replay_rows
from safemerge_callback.errors import AdapterError, ConfigError
from safemerge_callback.live import writer_for
from safemerge_callback.ops import LowRank
from tests.support.replay import ROWS
from tests.support.trainer import lora_weights
from tests.support.world import odd_model


def factors(seed, rank=3, sizes=((7, 5), (6, 4), (7, 5))):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        f"m{i}": LoraFactors(f"m{i}", random(rank, d_in), random(d_out, rank), 2.0)
        for i, (d_out, d_in) in enumerate(sizes)
    }


def dense(pair):
    return pair.B @ pair.A


@pytest.mark.parametrize("share", [0.2, 0.75])
def test_the_proximal_point_is_the_best_of_the_live_rank(share):
    live, other = factors(1), factors(2)
    new, residual = proximal_point(live, {name: f.update for name, f in other.items()}, share)
    worst = 0.0
    for name, pair in new.items():
        target = (1 - share) * dense(live[name]) + share * dense(other[name])
        U, S, Vh = torch.linalg.svd(target)
        assert torch.allclose(dense(pair), (U[:, :3] * S[:3]) @ Vh[:3], atol=1e-10)
        assert torch.allclose(pair.A @ pair.A.T, live[name].A @ live[name].A.T), "the live factors' gauge"
        worst = max(worst, float(S[3:].norm() / S.norm()))
    assert float(residual) == pytest.approx(worst, rel=1e-6)


def test_it_is_the_sum_itself_where_that_fits_the_rank_and_the_anchor_at_the_whole_way():
    live, other = factors(1), factors(2)
    along = {name: LowRank(other[name].A, live[name].B) for name in live}
    new, residual = proximal_point(live, along, 0.3)
    for name, pair in new.items():
        assert torch.allclose(dense(pair), 0.7 * dense(live[name]) + 0.3 * dense(along[name]), atol=1e-12)
    assert float(residual) < 1e-12
    new, _ = proximal_point(live, {name: f.update for name, f in other.items()}, 1.0)
    assert all(torch.allclose(dense(pair), dense(other[name]), atol=1e-12) for name, pair in new.items())


def test_the_papers_rho_is_a_share_of_the_way_by_the_learning_rate():
    assert LisaSettings(rho=3.0).share(0.1) == pytest.approx(0.3 / 1.3)
    assert LisaSettings(rho=1e12).share(1e-3) == pytest.approx(1.0)
    assert LisaSettings(rho=0).share(0.1) == 0.0
    assert (LisaSettings().share(0.1), LisaSettings(strength=0.2).share(0.1)) == (0.01, 0.2)


def test_blocks_take_turns_from_the_safety_rows_on():
    blocks = Blocks(2, 3, first=2, last=9)
    states = [blocks.state(step) for step in range(1, 12)]
    assert states == [None, "safe", "safe", "task", "task", "task", "safe", "safe", "task", None, None]
    assert [step for step in range(2, 10) if blocks.ends(step)] == [3, 6, 8, 9]
    assert [step for step in range(1, 12) if blocks.due(step, 20)] == [2, 3, 7, 8]


@dataclass
class Optimizer:
    """What is asked of one: the learning rate of the next step."""

    param_groups: list = field(default_factory=lambda: [{"lr": 0.5}])


def test_alternating_steps_on_two_quadratics_end_where_two_linear_equations_say():
    """½‖W - a‖² in safe steps and ½‖W - b‖² in task steps; ranks are full, so that nothing is lost to them."""
    model = odd_model(rank=5).double()
    writer, rate, rho = writer_for(model), 0.5, 1.0
    lisa = Lisa(LisaSettings(safe_steps=1, task_steps=1, rho=rho, proximal_from=0))
    torch.manual_seed(4)
    goals = {
        state: {name: torch.randn(f.shape, dtype=torch.float64) for name, f in writer.gather().items()}
        for state in ("safe", "task")
    }
    lisa.anchors["task"] = {name: LowRank(f.A.clone(), f.B.clone()) for name, f in writer.gather().items()}
    lisa.rate, ends = rate, {}
    for step in range(1, 80):
        state = lisa.schedule.state(step)
        stepped = {}
        for name, f in writer.gather().items():
            U, S, Vh = torch.linalg.svd(dense(f) - rate * (dense(f) - goals[state][name]), full_matrices=False)
            pad = f.rank - len(S)
            A, B = torch.nn.functional.pad(Vh, (0, 0, 0, pad)), torch.nn.functional.pad(U * S, (0, pad))
            stepped[name] = LowRank(A, B)
        writer.write(stepped)
        writer.write(lisa.proximal(RunPoint(step, 80, writer, None, optimizer=Optimizer())))
        ends[state] = {name: dense(f).clone() for name, f in writer.gather().items()}
    s = rate * rho
    keep, pull = (1 - rate + s) / (1 + s), rate / (1 + s)
    system = torch.tensor([[1.0, -keep], [-keep, 1.0]], dtype=torch.float64)
    for name in ends["safe"]:
        sides = torch.stack([pull * goals[state][name].flatten() for state in ("safe", "task")])
        fixed = torch.linalg.solve(system, sides)
        for row, state in zip(fixed, ("safe", "task"), strict=True):
            assert torch.allclose(ends[state][name].flatten(), row, atol=1e-8), (name, state)


class Gradients(TrainerCallback):
    """The gradients of each step as the optimizer gets them, and the weights before it."""

    def __init__(self):
        self.steps, self.weights = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        self.weights.append(lora_weights(model))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def near(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], rtol=1e-4, atol=1e-7) for n in one)


def train(world, chat_tokenizer, output, listed, resume=None, others=(), **changed):
    seen = Gradients()
    guard = [SafeMergeCallback(corrections=listed)] if listed else []
    trainer = world.trainer(output, *guard, *others, seen, tokenizer=chat_tokenizer, **changed)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


def lisa_of(**settings):
    about = {"rows": ROWS, "batch_size": 3, "safe_steps": 2, "task_steps": 2, "strength": 0.0}
    return [{"lisa": {**about, **settings}}]


@pytest.mark.parametrize("how", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulated"])
def test_a_safe_step_has_the_safety_rows_gradient_alone_and_a_task_step_the_tasks(
    world, chat_tokenizer, tmp_path, runs, how
):
    short = {"max_grad_norm": 0.0, "max_steps": 3, **how}
    trainer, ours = train(world, chat_tokenizer, tmp_path / "ours", lisa_of(), **short)
    without, plain = train(world, chat_tokenizer, tmp_path / "plain", None, **short)
    model = world.model().train()
    rows = replay_rows(
        model,
        chat_tokenizer,
        ReplaySettings(rows=ROWS, batch_size=3, harmful_share=None, weight=1.0, loss="ce", first_tokens=None),
    )
    for step in (0, 1):
        model.load_state_dict(ours.weights[step], strict=False)
        model.zero_grad()
        rows.loss(model).backward()
        want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert near(ours.steps[step], want), step
        assert not near(ours.steps[step], plain.steps[step])
    told = [next(e["loss"] for e in one.state.log_history if "loss" in e) for one in (trainer, without)]
    assert told[0] == pytest.approx(told[1], rel=1e-5), "what is logged is the task's own loss"
    assert [entry["figures"]["rows"] for entry in runs.entries(tmp_path / "ours", "gradient")] == [3.0, 3.0]
    # A task step is the one that a run without has where the weights are: both have seen as many batches.
    third = train(world, chat_tokenizer, tmp_path / "third", None, others=[Moved(ours.weights[2])], **short)
    assert near(ours.steps[2], third[1].steps[2])


class Moved(TrainerCallback):
    """Puts weights into the model before the third step."""

    def __init__(self, weights):
        self.weights = weights

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.load_state_dict(self.weights, strict=False)


def test_blocks_of_no_strength_write_nothing_and_those_with_some_go_to_the_other_state(
    world, chat_tokenizer, tmp_path, monkeypatch
):
    writes = []
    write = "safemerge_callback.live.writers.writer.LiveWriter.write"
    monkeypatch.setattr(write, lambda self, new: writes.append(len(new)))
    train(world, chat_tokenizer, tmp_path / "0", lisa_of())
    assert writes == []
    train(world, chat_tokenizer, tmp_path / "some", lisa_of(strength=0.1, proximal_from=3))
    assert writes == [4] * 4, "from the third step of six"


def test_the_whole_way_freezes_at_the_anchor(world, chat_tokenizer, tmp_path, runs):
    trainer, _ = train(world, chat_tokenizer, tmp_path, lisa_of(strength=1.0, proximal_from=0, safe_steps=1))
    B = [weight for name, weight in lora_weights(trainer.model).items() if "lora_B" in name]
    assert all(float(weight.abs().max()) < 1e-6 for weight in B)
    figures = runs.entries(tmp_path, "gradient")[-1]["figures"]
    assert (figures["proximal_share"], figures["residual"]) == (1.0, pytest.approx(0.0, abs=1e-6))


def test_a_resumed_run_is_the_unbroken_one(world, chat_tokenizer, tmp_path):
    listed = lisa_of(rho=20.0, strength=None, proximal_from=2)
    steps = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1}
    whole, _ = train(world, chat_tokenizer, tmp_path, listed, **steps)
    for step in (1, 4):
        again, _ = train(world, chat_tokenizer, tmp_path, listed, str(tmp_path / f"checkpoint-{step}"), **steps)
        assert same(lora_weights(whole.model), lora_weights(again.model)), step
    (tmp_path / "checkpoint-4" / ANCHOR_FILE).write_bytes(b"{")
    with pytest.raises(AdapterError, match="What blocks ended with is lost with it"):
        train(world, chat_tokenizer, tmp_path, listed, str(tmp_path / "checkpoint-4"), **steps)


def test_it_asks_no_reference(world, chat_tokenizer, tmp_path, monkeypatch, runs):
    monkeypatch.setattr("safemerge_callback.corrections.replay.take_reference", lambda *_, **__: 1 / 0)
    train(world, chat_tokenizer, tmp_path, lisa_of(safe_steps=1), max_steps=2)
    assert not runs.entries(tmp_path, "error")


def test_a_safe_step_whose_rows_fail_is_the_tasks(world, chat_tokenizer, tmp_path, monkeypatch):
    _, plain = train(world, chat_tokenizer, tmp_path / "plain", None, max_steps=1)
    monkeypatch.setattr("safemerge_callback.corrections.replay.row_losses", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="lisa failed at step 1, which goes without its gradient"):
        _, ours = train(world, chat_tokenizer, tmp_path / "ours", lisa_of(), max_steps=3)
    assert same(ours.steps[0], plain.steps[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"safe_steps": 0}, "safe_steps is 0: give a whole number of 1 or more"),
        ({"every": 2}, "so give safe_steps and task_steps"),
        ({"strength": 0.1, "rho": 1.0}, "strength and rho are both given"),
        ({"strength": 1.5}, "give a share of the way, from 0 to 1"),
        ({"rho": -1}, "rho is -1: give a number of 0"),
        ({"proximal_from": -1}, "proximal_from is -1: give a whole number, or a share"),
        ({"proximal_from": 1.5}, "proximal_from is 1.5: give a whole number, or a share"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        LisaSettings(**settings)


def test_a_run_that_would_never_train_its_task_is_refused(world, chat_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="so that the task is never trained"):
        train(world, chat_tokenizer, tmp_path, lisa_of(safe_steps=6))
