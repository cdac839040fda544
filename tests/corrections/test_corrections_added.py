"""A change with state and a gradient term, added from here: nothing else in the package knows of them."""

import io
import json
import re
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from safemerge_callback import SafetyEvalCallback
from safemerge_callback.corrections.protocol import Change
from safemerge_callback.corrections.registry import CORRECTIONS, correction
from safemerge_callback.corrections.schedule import Schedule
from safemerge_callback.decision import Edit
from safemerge_callback.errors import ConfigError
from safemerge_callback.ops import LowRank
from safemerge_callback.record import change_entry
from safemerge_callback.reports import draw_heat_map, read_history, render_page, summary, watch_run
from safemerge_callback.reports.page.figures import costs, happenings, tiles
from safemerge_callback.training import Rollback

WATCH = {"gate": "watch", "safety_adapter": None, "every": 3}


@dataclass(frozen=True, kw_only=True)
class Shrinking(Schedule):
    """Each time a smaller share of the update is left."""

    every: float = 2
    share: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ConfigError(f"share is {self.share}: give a share of the update, above 0 and at most 1")


class Shrink:
    """B is multiplied by share^n at the n-th time, so that a count that is lost shows in the weights."""

    name, noun = "shrink", "count of times that it shrank"

    def __init__(self, settings):
        self.schedule, self.times = settings, 0

    def change(self, at):
        self.times += 1
        left = self.schedule.share**self.times
        new = {name: LowRank(f.A.clone(), f.B * left) for name, f in at.factors().items()}
        edits = tuple(Edit(name, 0.0, 1 - left) for name in new)
        return Change(new, edits, dict.fromkeys(new, left), partial(change_entry, at.step, self.name, edits))

    def after_step(self, at):
        pass

    def save(self, folder, save):
        (folder / "shrink.json").write_text(json.dumps({"times": self.times, "save": save}))

    def load(self, folders, save):
        files = [folder / "shrink.json" for folder in folders if (folder / "shrink.json").is_file()]
        for stored in (json.loads(file.read_text()) for file in files):
            if save is None or stored["save"] == save:
                self.times = stored["times"]
                return True
        return False

    def rewind(self, folders, save):
        self.load(folders, save)


@dataclass(frozen=True, kw_only=True)
class Rows(Schedule):
    """A loss on fixed rows."""

    weight: float = 0.5
    fails: bool = False


class OnRows:
    """The model's own loss on rows of its own."""

    name = "rows"

    def __init__(self, settings):
        self.schedule, self.weight, self.fails = settings, settings.weight, settings.fails

    def loss(self, at, model):
        loss = model(**rows()).loss
        if self.fails:
            loss.backward()
            raise RuntimeError("no rows")
        return loss


def rows():
    ids = torch.arange(3, 27).reshape(3, 8)
    return {"input_ids": ids, "labels": ids}


@pytest.fixture(autouse=True)
def added():
    """Both are entered by name, and out again after the test."""
    before = dict(CORRECTIONS)

    @correction(Shrinking, cost="nothing")
    def shrink(settings):
        return Shrink(settings)

    @correction(Rows, cost="one forward and one backward pass of its rows")
    def rows(settings):
        return OnRows(settings)

    yield
    CORRECTIONS.clear()
    CORRECTIONS.update(before)


class Gradients(TrainerCallback):
    """The gradients of each step as the optimizer gets them, and where torch's random numbers stand then."""

    def __init__(self):
        self.steps, self.random = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({n: p.grad.detach().clone() for n, p in named if p.grad is not None})
        self.random.append(torch.get_rng_state())


class ByHand(TrainerCallback):
    """What `shrink` does, done by hand."""

    def __init__(self):
        self.times = 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % 2 == 0:
            self.times += 1
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.mul_(0.5**self.times)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_change_is_written_and_recorded(world, runs, tmp_path):
    guard = world.guard(**WATCH, corrections=[{"shrink": {}}])
    ours = world.trainer(tmp_path / "ours", guard, max_steps=6)
    ours.train()
    by_hand = world.trainer(tmp_path / "hand", ByHand(), max_steps=6)
    by_hand.train()
    assert equal(runs.lora_weights(ours.model), runs.lora_weights(by_hand.model))
    changes = runs.entries(tmp_path / "ours", "change")
    assert [(e["step"], e["correction"]) for e in changes] == [(2, "shrink"), (4, "shrink"), (6, "shrink")]
    assert [{m["task_weight"] for m in e["modules"]} for e in changes] == [{0.5}, {0.125}, {0.015625}]
    start, *_ = runs.entries(tmp_path / "ours")
    told = {"every": 2, "from_step": 0, "until_step": None, "at_train_end": False, "share": 0.5}
    assert start["config"]["corrections"] == [{"shrink": told}]
    assert guard.progress.merges == 0
    assert set(guard.progress.task_weights.values()) == {0.015625}


def test_reports_call_a_change_by_its_corrections_name(world, runs, tmp_path):
    """Nothing was merged in this run, and no table, page or watch says that it was."""
    guard = world.guard(**WATCH, corrections=[{"shrink": {}}])
    world.trainer(tmp_path, guard, max_steps=6).train()
    history = read_history(tmp_path)
    modules = len(history.modules)
    changes = f"{3 * modules} changes by shrink in {modules} modules"
    table = summary(history)
    assert "2 checks at steps 2 to 6" in table
    assert f"0 merges in 0 modules; {changes}" in table
    assert re.search(r"merges\W+shrink\W+task left", table)
    shown = Console(file=io.StringIO(), width=132, record=True)
    watch_run(tmp_path, once=True, console=shown)
    watch = shown.export_text()
    assert f"{changes}; the last at step 6: {modules} modules" in watch
    assert re.search(r"merges +shrink +task left", watch)
    assert "2 checks, gate watch" in watch
    assert "merges in" not in watch
    assert [(step, what) for step, what, _ in happenings(history)] == [(step, "shrink") for step in (2, 4, 6)]
    assert [name for name, _ in costs(history)][:3] == ["checks", "merges", "changes by shrink"]
    tiles_by_label = {tile.label: tile.value for tile in tiles(history)}
    assert (tiles_by_label["module merges"], tiles_by_label["module changes by shrink"]) == ("0", str(3 * modules))
    page = render_page(history)
    assert '<span class="tag shrink">shrink</span>' in page
    assert '"mark":"changed by shrink"' in page
    assert '<span class="tag merge">' not in page
    picture = draw_heat_map(history)
    assert any(f"nothing merged; {changes}" in text.get_text() for text in picture.texts)
    assert "changed by shrink" in [text.get_text() for text in picture.legends[0].get_texts()]


def test_without_corrections_nothing_is_told_of_them(world, runs, tmp_path):
    world.trainer(tmp_path, world.guard(**WATCH), max_steps=3).train()
    assert "corrections" not in runs.entries(tmp_path, "start")[0]["config"]


def test_a_change_is_taken_back_when_the_witness_says_so(world, runs, tmp_path):
    class Never:
        def before_merge(self, step):
            pass

        def after_merge(self, step):
            return "it cost too much"

        def closing(self):
            pass

    class Watching(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            guard.session.engine.witness = Never()

    guard = world.guard(**WATCH, optimizer_state="reset", corrections=[{"shrink": {}}])
    ours = world.trainer(tmp_path / "ours", guard, Watching(), max_steps=6)
    ours.train()
    plain = world.trainer(tmp_path / "plain", max_steps=6)
    plain.train()
    assert equal(runs.lora_weights(ours.model), runs.lora_weights(plain.model))
    assert [e["step"] for e in runs.entries(tmp_path / "ours", "rollback")] == [2, 4, 6]
    assert guard.progress.task_weights == {}


def test_its_state_is_saved_and_a_resume_goes_on_from_it(world, runs, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}

    def guarded(output):
        return world.trainer(output, world.guard(**WATCH, corrections=[{"shrink": {"every": 2}}]), **saving)

    unbroken = guarded(tmp_path / "unbroken")
    unbroken.train()
    resumed = guarded(tmp_path / "unbroken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))
    assert equal(runs.lora_weights(unbroken.model), runs.lora_weights(resumed.model))
    (tmp_path / "unbroken" / "checkpoint-3" / "shrink.json").unlink()
    with pytest.warns(UserWarning, match="holds no count of times that it shrank, so it starts anew"):
        guarded(tmp_path / "unbroken").train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))


def test_a_resume_tells_of_corrections_that_came_and_went(world, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    world.trainer(tmp_path, world.guard(**WATCH, corrections=[{"shrink": {}}]), **saving).train()
    with pytest.warns(UserWarning, match=r"settings changed since the checkpoint.*corrections .*'shrink'.* -> None"):
        world.trainer(tmp_path, world.guard(**WATCH), **saving).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )


def test_a_probe_may_take_back_the_changes_of_a_run_that_never_merges(world, chat_tokenizer, runs, tmp_path):
    probe = SafetyEvalCallback(
        prompts={"bad": ["a b"]},
        benign={"good": ["x y"]},
        tokenizer=chat_tokenizer,
        task=Falls(),
        rollback=Rollback(task=0.05),
        every=0,
        max_new_tokens=2,
        quiet=True,
    )
    guard = world.guard(**WATCH, corrections=[{"shrink": {"every": 3}}])
    world.trainer(tmp_path, guard, probe, max_steps=3).train()
    assert [e["step"] for e in runs.entries(tmp_path, "rollback")] == [3]


class Falls:
    """A score that falls each time."""

    score = 1.0

    def __call__(self, model, tokenizer):
        self.score -= 0.1
        return self.score


def test_a_change_that_fails_costs_no_training(world, runs, tmp_path, monkeypatch):
    def broken(self, at):
        raise RuntimeError("no room")

    monkeypatch.setattr(Shrink, "change", broken)
    trainer = world.trainer(tmp_path, world.guard(**WATCH, corrections=[{"shrink": {}}]), max_steps=4)
    with pytest.warns(UserWarning, match="shrink failed at step 2, nothing was merged, training goes on"):
        trainer.train()
    assert [(e["step"], e["where"]) for e in runs.entries(tmp_path, "error")] == [(2, "shrink"), (4, "shrink")]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.*. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["plain", "accumulated", "reentrant", "checkpointed"],
)
def test_a_gradient_term_adds_the_gradient_of_its_loss(world, tmp_path, how):
    """Once a step whatever the accumulation, and before clipping, which is off here so that it shows."""
    seen = {}
    for name, listed in {"with": [{"rows": {"weight": 0.5}}], "without": None}.items():
        seen[name] = Gradients()
        guard = world.guard(**{**WATCH, "every": 1}, corrections=listed)
        world.trainer(tmp_path / name, guard, seen[name], max_steps=1, max_grad_norm=0.0, **how).train()
    model = world.model().train()
    model(**rows()).loss.backward()
    want = {name: 0.5 * p.grad for name, p in model.named_parameters() if p.grad is not None}
    (ours,), (plain,) = seen["with"].steps, seen["without"].steps
    scale = max(float(g.abs().max()) for g in want.values())
    assert scale > 1e-4
    for name, gradient in want.items():
        assert torch.allclose(ours[name] - plain[name], gradient, rtol=0, atol=1e-6 * max(1.0, scale)), name


def test_the_terms_loss_stands_in_journal_and_log(world, runs, tmp_path):
    guard = world.guard(**WATCH, corrections=[{"rows": {"weight": 0.25, "from_step": 2}}])
    trainer = world.trainer(tmp_path, guard, max_steps=5, logging_steps=2)
    trainer.train()
    told = runs.entries(tmp_path, "gradient")
    assert [(e["step"], e["correction"], e["weight"], e["steps"]) for e in told] == [
        (2, "rows", 0.25, 1),
        (4, "rows", 0.25, 2),
        (5, "rows", 0.25, 1),
    ]
    assert all(e["loss"] > 0 for e in told)
    logged = [
        e["safemerge/corrections/rows/loss"]
        for e in trainer.state.log_history
        if "safemerge/corrections/rows/loss" in e
    ]
    assert logged == [e["loss"] for e in told]


@pytest.mark.parametrize(("strategy", "steps"), [("epoch", [4, 8]), ("no", [8])])
def test_its_loss_is_told_whenever_the_trainer_logs(world, runs, tmp_path, strategy, steps):
    """Two epochs of four steps; the end of a training is always logged."""
    guard = world.guard(**WATCH, corrections=[{"rows": {}}])
    world.trainer(tmp_path, guard, max_steps=8, per_device_train_batch_size=4, logging_strategy=strategy).train()
    assert [e["step"] for e in runs.entries(tmp_path, "gradient")] == steps


def test_weight_0_is_absence_and_the_random_numbers_are_the_tasks(world, runs, tmp_path):
    ends, random = {}, {}
    for name, listed in {"none": None, "zero": [{"rows": {"weight": 0}}], "some": [{"rows": {"weight": 0.5}}]}.items():
        seen = Gradients()
        guard = world.guard(**WATCH, corrections=listed)
        trainer = world.trainer(tmp_path / name, guard, seen, model=world.model(lora_dropout=0.3), max_steps=4)
        trainer.train()
        ends[name], random[name] = runs.lora_weights(trainer.model), seen.random
    assert equal(ends["none"], ends["zero"])
    assert not equal(ends["none"], ends["some"])
    assert len(random["none"]) > 1
    assert all(torch.equal(x, y) for x, y in zip(random["none"], random["some"], strict=True))


def test_a_term_that_fails_leaves_no_gradient_and_costs_no_training(world, runs, tmp_path):
    guard = world.guard(**WATCH, corrections=[{"rows": {"fails": True}}])
    trainer = world.trainer(tmp_path / "ours", guard, max_steps=3)
    with pytest.warns(
        UserWarning, match="rows failed at step 1, which goes without its gradient: RuntimeError: no rows"
    ):
        trainer.train()
    plain = world.trainer(tmp_path / "plain", max_steps=3)
    plain.train()
    assert equal(runs.lora_weights(trainer.model), runs.lora_weights(plain.model))
    assert [(e["step"], e["where"]) for e in runs.entries(tmp_path / "ours", "error")] == [
        (n, "rows") for n in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        ([{"shrinc": {}}], "correction 'shrinc' is unknown: choose one of .*; did you mean 'shrink'"),
        ([{"shrink": {"shre": 0.5}}], "correction 'shrink': setting 'shre' is unknown; did you mean 'share'"),
        ([{"shrink": {"share": 2}}], "correction 'shrink': share is 2: give a share of the update"),
        ([{"shrink": {"every": 1.5}}], "correction 'shrink': every is 1.5"),
        ([{"shrink": {"every": 0}}], "correction 'shrink': every is 0 and at_train_end is false"),
        ([{"shrink": {"until_step": -1}}], "until_step is -1"),
        ([{"shrink": {"from_step": 5, "until_step": 2}}], "until_step 2 comes before from_step 5"),
        ([{"shrink": 2}], "correction 'shrink' is given 2"),
        ([{"shrink": {}}, {"shrink": {}}], "corrections name 'shrink' twice"),
        ([{"shrink": {}, "rows": {}}], "give each entry as one name and its settings"),
        (["shrink"], "give each entry as one name and its settings"),
        ({"shrink": {}}, "corrections is {'shrink': {}}: give a list"),
        ("[{", "is no JSON"),
    ],
)
def test_what_cannot_be_is_refused_when_the_callback_is_made(world, listed, says):
    with pytest.raises(ConfigError, match=says):
        world.guard(**WATCH, corrections=listed)


def test_a_term_that_a_training_cannot_take_is_refused_before_the_first_step(world, tmp_path, monkeypatch):
    from safemerge_callback.live import micro_batch

    monkeypatch.setattr(micro_batch, "engine_of", lambda *about: "DeepSpeed")
    seen = Gradients()
    trainer = world.trainer(tmp_path, world.guard(**WATCH, corrections=[{"rows": {}}]), seen, max_steps=2)
    with pytest.raises(ConfigError, match="correction 'rows' adds a gradient, which DeepSpeed takes only through"):
        trainer.train()
    assert seen.steps == []


def test_what_would_never_be_due_is_refused_before_the_first_step(world, tmp_path):
    trainer = world.trainer(tmp_path, world.guard(**WATCH, corrections=[{"shrink": {"every": 5}}]), max_steps=4)
    with pytest.raises(ConfigError, match=r"correction .shrink. is never due in this run of 4 steps .every=5"):
        trainer.train()


def test_what_is_neither_a_change_nor_a_term_is_refused(world, tmp_path):
    @correction(Rows, cost="nothing")
    def neither(settings):
        return settings

    trainer = world.trainer(tmp_path, world.guard(**WATCH, corrections=[{"neither": {}}]), max_steps=4)
    with pytest.raises(ConfigError, match="correction 'neither' made a Rows, which is neither a change nor a gradient"):
        trainer.train()


def test_a_change_that_the_engine_cannot_have_is_refused(world, tmp_path, monkeypatch):
    from safemerge_callback.training.run import opening

    monkeypatch.setattr(opening, "engine_of", lambda *about: "FSDP")

    @correction(Shrinking, cost="nothing", engines={"DDP"})
    def shrink(settings):
        return Shrink(settings)

    trainer = world.trainer(tmp_path, world.guard(**WATCH, corrections=[{"shrink": {}}]), max_steps=4)
    with pytest.raises(ConfigError, match=r"correction 'shrink' serves \['DDP'\], and this training is under FSDP"):
        trainer.train()


def test_a_correction_that_needs_a_safety_adapter_is_given_one_or_refused(world, runs, tmp_path):
    seen = []

    class Looks(Shrink):
        def change(self, at):
            seen.append([sorted(adapter.factors) == sorted(at.factors()) for adapter in at.safety])

    @correction(Shrinking, cost="nothing", needs={"safety_adapter"})
    def shrink(settings):
        return Looks(settings)

    with pytest.raises(ConfigError, match="safety_adapter is missing: correction 'shrink' needs one"):
        world.guard(**WATCH, corrections=[{"shrink": {}}])
    guard = world.guard(gate="watch", every=3, corrections=[{"shrink": {}}])
    world.trainer(tmp_path, guard, max_steps=4).train()
    assert seen == [[True], [True]]
    assert runs.entries(tmp_path, "change") == []
