"""`replay` in real trainings: what it holds, what it leaves alone, and that a resume goes on as if nothing had been."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from datasets import Dataset

from safemerge_callback import SafeMergeCallback, SafeMergeConfig
from safemerge_callback.corrections.losses import LOSSES
from safemerge_callback.corrections.replay import KindLosses, ReplayRows, ReplaySettings, replay_rows, row_losses
from safemerge_callback.errors import AdapterError, ConfigError
from safemerge_callback.signals.adapter_off import adapter_off
from safemerge_callback.signals.reference import take_reference
from safemerge_callback.signals.rows import RowTokens
from safemerge_callback.training.config.shorthands import OF_THE_RUN
from tests.support.ranks import run_on
from tests.support.replay import ROWS, replay_entry, replaying
from tests.support.terminal import Terminal
from tests.support.trainer import lora_weights
from tests.support.world import SIZES, TARGETS, World, with_lora


def train(world, chat_tokenizer, output, *guards, **changed):
    trainer = world.trainer(output, *guards, tokenizer=chat_tokenizer, **changed)
    trainer.train()
    return trainer


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def row_tokens(chat_tokenizer):
    rows = []
    for row in ROWS:
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = chat_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        response = chat_tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        rows.append(RowTokens(tuple(prompt), (*response, chat_tokenizer.eos_token_id), row["kind"]))
    return rows


@pytest.mark.parametrize("loss", LOSSES)
def test_the_rows_are_held_where_the_task_alone_loses_them(world, chat_tokenizer, tmp_path, loss):
    weight = {"ce": 1.0, "kl": 1.0, "sbr": 20.0}[loss]
    many = {"max_steps": 40, "learning_rate": 2e-2}
    plain = train(world, chat_tokenizer, tmp_path / "plain", **many)
    held = train(world, chat_tokenizer, tmp_path / loss, replaying(loss=loss, weight=weight, batch_size=3), **many)
    rows, losses = row_tokens(chat_tokenizer), {}
    for name, trainer in {"plain": plain, "held": held}.items():
        model = trainer.model.eval()
        with adapter_off(model):
            reference = take_reference(model, rows, top_k=None, hidden=True)
        with torch.no_grad():
            losses[name] = float(row_losses(model, rows, reference, range(3), LOSSES[loss]).mean())
    # What `ce` asks for is none of the model's own words, which a short training learns a part of.
    assert losses["held"] < {"ce": 0.95}.get(loss, 0.5) * losses["plain"]


def test_weight_0_is_absence_to_the_bit(world, chat_tokenizer, tmp_path):
    model = {"model": world.model(lora_dropout=0.3)}
    plain = train(world, chat_tokenizer, tmp_path / "plain", **model)
    model = {"model": world.model(lora_dropout=0.3)}
    absent = train(world, chat_tokenizer, tmp_path / "0", replaying(weight=0.0), **model)
    assert same(lora_weights(plain.model), lora_weights(absent.model))
    model = {"model": world.model(lora_dropout=0.3)}
    there = train(world, chat_tokenizer, tmp_path / "1", replaying(), **model)
    assert not same(lora_weights(plain.model), lora_weights(there.model))


@pytest.mark.parametrize(
    "settings",
    [{}, {"by_need": True, "tolerance": 100.0}, {"batch_size": 2, "hinge": 0.5, "loss": "ce"}],
)
def test_a_resumed_run_is_the_unbroken_one(world, chat_tokenizer, tmp_path, settings):
    steps = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1}
    whole = train(world, chat_tokenizer, tmp_path / "whole", replaying(**settings), **steps)
    for step in (1, 4, 7):
        again = world.trainer(tmp_path / "whole", replaying(**settings), tokenizer=chat_tokenizer, **steps)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same(lora_weights(whole.model), lora_weights(again.model)), step


def test_by_need_rows_come_in_every_step_until_they_say_that_nothing_is_lost(world, chat_tokenizer, tmp_path, runs):
    steps = {"max_steps": 12, "logging_steps": 1}
    train(world, chat_tokenizer, tmp_path, replaying(by_need=True, tolerance=100.0), **steps)
    assert [e["step"] for e in runs.entries(tmp_path, "gradient")] == [1, 2, 3, 4, 5, 7, 11]
    train(world, chat_tokenizer, tmp_path / "needed", replaying(by_need=True, tolerance=1e-9), **steps)
    assert counts_of(runs, tmp_path / "needed") == (12, 12)


def test_a_checkpoint_from_before_rises_were_kept_is_gone_on_with(world, chat_tokenizer, tmp_path, runs):
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(world, chat_tokenizer, tmp_path, replaying(by_need=True), **steps)
    (place,) = (tmp_path / "checkpoint-2").glob("safemerge_replay.json")
    state = json.loads(place.read_text())
    assert len(state.pop("recent")) == 2
    place.write_text(json.dumps(state))
    again = world.trainer(tmp_path, replaying(by_need=True), tokenizer=chat_tokenizer, **steps)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert counts_of(runs, tmp_path) == (4, 4)


def counts_of(runs, folder):
    """Over how many steps and rows the journal's lines are."""
    entries = runs.entries(folder, "gradient")
    return sum(e["steps"] for e in entries), sum(e["figures"]["rows"] for e in entries)


def test_what_was_not_logged_yet_is_told_before_a_checkpoint_so_that_a_resume_counts_it(
    world, chat_tokenizer, tmp_path, runs
):
    steps = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "logging_steps": 5}
    whole = train(world, chat_tokenizer, tmp_path, replaying(), **steps)
    assert [e["step"] for e in runs.entries(tmp_path, "gradient")] == [3, 5, 6, 8]
    again = world.trainer(tmp_path, guard := replaying(), tokenizer=chat_tokenizer, **steps)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert counts_of(runs, tmp_path) == (8, 8)
    assert guard.progress.correction_steps == {"replay": 8}
    key = "safemerge/corrections/replay/rows"
    assert [e["step"] for e in whole.state.log_history if key in e] == [3, 5, 6, 8]


class Improving(transformers.TrainerCallback):
    """Each evaluation at one of these steps is the best so far."""

    def __init__(self, *steps):
        self.steps = steps

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_rank"] = float(state.global_step if state.global_step in self.steps else 0)


@pytest.mark.parametrize(("unit", "saved"), [("steps", (2, 6)), ("epoch", (8,))])
def test_what_the_best_checkpoint_has_is_told_before_it(world, chat_tokenizer, tmp_path, runs, unit, saved):
    """Whether it is saved is decided within the evaluation, when the hooks of the step are over."""
    steps = {"max_steps": 12, "save_strategy": "best", "eval_strategy": unit, "eval_steps": 2, "logging_steps": 5}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rank", "greater_is_better": True}

    def trainer():
        callbacks = Improving(*saved), replaying(batch_size=2)
        return world.trainer(tmp_path, *callbacks, tokenizer=chat_tokenizer, **steps, **best)

    def readings():
        entries = runs.entries(tmp_path, "gradient")
        return [{key: value for key, value in entry.items() if key not in ("seconds", "time")} for entry in entries]

    trainer().train()
    unbroken = readings()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in saved}
    assert counts_of(runs, tmp_path) == (12, 24)
    for step in saved:
        trainer().train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert readings() == unbroken


class Asking(transformers.TrainerCallback):
    """Asks for a checkpoint when the guard's own hook of the step is over."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step == 3


def test_a_checkpoint_that_another_callback_asks_for_has_all_that_was_done(world, chat_tokenizer, tmp_path, runs):
    steps = {"max_steps": 8, "save_strategy": "steps", "save_steps": 100, "logging_steps": 5}

    def trainer():
        return world.trainer(tmp_path, replaying(), Asking(), tokenizer=chat_tokenizer, **steps)

    trainer().train()
    assert [e["step"] for e in runs.entries(tmp_path, "gradient")] == [3, 5, 8]
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [e["step"] for e in runs.entries(tmp_path, "gradient")] == [3, 5, 8]
    assert counts_of(runs, tmp_path) == (8, 8)


def test_what_no_step_had_is_not_counted(world, chat_tokenizer, tmp_path, runs, monkeypatch):
    """A row that was drawn for a pass whose loss was dropped."""
    losses = iter([float("nan")])
    mean = ReplayRows.mean
    monkeypatch.setattr(ReplayRows, "mean", lambda self, rows: mean(self, rows) * next(losses, 1.0))
    guard = replaying()
    with pytest.warns(UserWarning, match="replay failed at step 1"):
        train(world, chat_tokenizer, tmp_path, guard)
    assert counts_of(runs, tmp_path) == (5, 5)
    assert guard.progress.correction_steps == {"replay": 5}


def test_figures_are_those_of_all_processes(monkeypatch):
    losses = KindLosses()
    losses.add(["harm", "harm"], torch.tensor([1.0, 2.0]))
    other = {"harm": (6.0, 1), "benign": (4.0, 2)}
    monkeypatch.setattr("safemerge_callback.corrections.replay.everyones", lambda share: [share, other])
    assert losses.take() == {"loss_benign": 2.0, "loss_harm": 3.0, "rows": 5.0}
    monkeypatch.undo()
    assert losses.take() == {"rows": 0.0}


def test_a_resume_on_another_number_of_processes_says_so(world, chat_tokenizer, tmp_path):
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(world, chat_tokenizer, tmp_path, replaying(), **steps)
    path = tmp_path / "checkpoint-2" / "safemerge_replay.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ranks": 3, "drawn": 6}))
    again = world.trainer(tmp_path, replaying(), tokenizer=chat_tokenizer, **steps)
    with pytest.warns(UserWarning, match="the checkpoint is of 3 processes and there are 1 now"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"save": 1}', "bad drawn", "bad least"])
def test_a_state_that_cannot_be_read_is_refused_before_the_first_step(world, chat_tokenizer, tmp_path, text):
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(world, chat_tokenizer, tmp_path, replaying(), **steps)
    path = tmp_path / "checkpoint-2" / "safemerge_replay.json"
    if text.startswith("bad"):
        text = json.dumps({**json.loads(path.read_text()), text.split()[1]: "two"})
    path.write_text(text)
    again = world.trainer(tmp_path, replaying(), tokenizer=chat_tokenizer, **steps)
    if text == '{"save": 1}':  # another save's
        with pytest.warns(UserWarning, match="holds no place in the safety rows"):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    else:
        with pytest.raises(AdapterError, match=r"safemerge_replay\.json' cannot be read"):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_row_longer_than_the_model_takes_is_refused(world, chat_tokenizer, tmp_path):
    rows = [{**ROWS[0], "prompt": "a " * 70}, ROWS[2]]
    with pytest.raises(ConfigError, match="64"):
        train(world, chat_tokenizer, tmp_path, replaying(rows=rows))


@pytest.mark.parametrize("row", [{"prompt": "new a"}, {"response": "w1 new w2"}])
def test_a_token_that_the_model_has_no_row_for_is_refused(world, chat_tokenizer, tmp_path, row):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.add_tokens(["new"])
    with pytest.raises(ConfigError, match="the tokenizer gives token 64, and the model has rows for 64"):
        train(world, tokenizer, tmp_path, replaying(rows=[{**ROWS[0], **row}, ROWS[2]]))


def test_a_schedule_that_is_never_due_is_refused(world, chat_tokenizer, tmp_path):
    with pytest.raises(
        ConfigError, match=r"'replay' is never due in this run of 6 steps \(every=1, from_step=9, until"
    ):
        train(world, chat_tokenizer, tmp_path, replaying(from_step=9))


@pytest.mark.parametrize("family", ["LlamaForSequenceClassification", "T5ForConditionalGeneration"])
def test_a_model_that_predicts_no_next_token_is_refused(world, chat_tokenizer, tmp_path, family):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1} if family.startswith("T5") else SIZES
    made = getattr(transformers, family)
    model = with_lora(made(made.config_class(**sizes)), ["q"] if family.startswith("T5") else TARGETS)
    with pytest.raises(ConfigError, match="replay holds what a model says next"):
        world.trainer(tmp_path, replaying(), model=model, tokenizer=chat_tokenizer).train()


def test_rows_are_plain_whatever_held_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    for rows, kept in ((path, str(path)), (Dataset.from_list(ROWS), ROWS), (iter(ROWS), ROWS), (tuple(ROWS), ROWS)):
        config = replaying(rows=rows).config
        assert config.corrections[0]["replay"]["rows"] == kept
        assert SafeMergeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_rows_are_published_as_their_number_and_formats_as_they_are():
    formats = [{"system": "Be kind."}, {"template": "Answer: {prompt}"}]
    (entry,) = replaying(in_format=formats).config.to_publish()["corrections"]
    assert entry["replay"]["rows"] == "3 rows"
    assert entry["replay"]["in_format"] == formats


def test_the_journal_says_what_it_cost_and_held(world, chat_tokenizer, tmp_path, runs):
    train(world, chat_tokenizer, tmp_path, replaying(batch_size=2))
    entries = runs.entries(tmp_path, "gradient")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert all(entry["correction"] == "replay" and entry["steps"] == 1 for entry in entries)
    assert entries[0]["loss"] == pytest.approx(0.0, abs=1e-6)
    assert entries[-1]["loss"] > 1e-5
    (start,) = runs.entries(tmp_path, "start")
    assert start["subspace"]["path"] is None
    assert start["config"]["corrections"][0]["replay"]["rows"] == "3 rows"
    assert start["config"].keys() == {*OF_THE_RUN, "subspace"}
    assert not {"planned", "placement"} & start.keys()
    assert ROWS[0]["response"] not in json.dumps(start)
    assert not runs.entries(tmp_path, "check")


@pytest.mark.parametrize(("quiet", "disable_tqdm"), [(False, False), (True, False), (False, True)])
def test_what_it_readies_draws_a_bar_unless_a_run_is_to_be_quiet(
    world, chat_tokenizer, tmp_path, monkeypatch, quiet, disable_tqdm
):
    monkeypatch.setattr("sys.stderr", screen := Terminal())
    guard = SafeMergeCallback(corrections=[replay_entry()], quiet=quiet)
    train(world, chat_tokenizer, tmp_path, guard, disable_tqdm=disable_tqdm, max_steps=1)
    assert ("replay: reference" in screen.getvalue()) == (not quiet and not disable_tqdm)


@pytest.mark.parametrize(
    ("settings", "kept"), [({}, None), ({"by_need": True}, 0), ({"hinge": 1.0}, 0), ({"loss": "kl", "top_k": 5}, 5)]
)
def test_of_the_reference_is_kept_what_is_read(world, chat_tokenizer, settings, kept):
    rows = replay_rows(world.model(), chat_tokenizer, ReplaySettings(rows=ROWS, **{"loss": "ce", **settings}))
    assert (rows.reference is None) == (kept is None)
    assert (rows.floor is None) == ("hinge" not in settings)
    if rows.reference is not None:
        assert {row.log_probs.shape[-1] for row in rows.reference} == {kept}
    losses, _ = rows.next_losses(world.model())
    assert losses.isfinite().all()


def test_a_dear_term_is_warned_of_once_with_what_lowers_it(world, chat_tokenizer, tmp_path, monkeypatch):
    """By a clock on which each pass takes a minute, and each step of the task two."""
    times = (60.0 * (n + n // 2) for n in itertools.count())
    monkeypatch.setattr("safemerge_callback.corrections.replay.settled", lambda device: next(times))
    with pytest.warns(
        UserWarning, match=r"replay takes 33% of the training's time, coming every 1 of its steps"
    ) as told:
        train(world, chat_tokenizer, tmp_path, replaying(), max_steps=10)
    (words,) = [str(one.message) for one in told if "replay takes" in str(one.message)]
    assert words.endswith("may take (max_share: 0.15; when it comes then depends on the machine's pace)")
    assert "measured until step 6: let it come more seldom (every: 2)" in words


def test_a_share_that_it_may_take_makes_it_come_more_seldom(world, chat_tokenizer, tmp_path, runs, monkeypatch):
    times = (60.0 * (n + n // 2) for n in itertools.count())
    monkeypatch.setattr("safemerge_callback.corrections.replay.settled", lambda device: next(times))
    train(world, chat_tokenizer, tmp_path, replaying(max_share=0.15), max_steps=12)
    assert [e["step"] for e in runs.entries(tmp_path, "gradient")] == [1, 2, 3, 4, 5, 6, 9, 12]


def test_without_a_tokenizer_it_is_refused_before_the_first_step(world, tmp_path):
    with pytest.raises(ConfigError, match="this trainer has no tokenizer"):
        world.trainer(tmp_path, replaying()).train()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss": "kld"}, "loss 'kld' is unknown.*did you mean 'kl'"),
        ({"weight": -1}, "weight is -1"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"first_tokens": 0}, "first_tokens is 0"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"max_share": 1}, "max_share is 1"),
        ({"hinge": 0}, "hinge is 0"),
        ({"max_norm": -2}, "max_norm is -2"),
        ({"surgery": "yes"}, "surgery is 'yes'"),
        ({"rows": ROWS, "prompts": ["x"]}, "rows and prompts are both given"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"harmful_share": 1.5}, "harmful_share is 1.5"),
        ({"harmful_share": True}, "harmful_share is True"),
        ({"longest": 0}, "longest is 0"),
        ({"tolerance": 0}, "tolerance is 0"),
        ({"tolerance": None}, "tolerance is None"),
        ({"prompts": 3}, "prompts is 3"),
        ({"prompts": []}, r"prompts is \[\]"),
        ({"prompts": ["advbench"]}, r"prompts \['advbench'\] are of one kind alone, harm"),
        ({"prompts": "advbenhc"}, "prompts 'advbenhc' are unknown.*did you mean 'advbench'"),
        ({"in_format": {"sytem": "Be kind."}}, r"in_format is \{'sytem': 'Be kind\.'\}: give a mapping of some of"),
        ({"in_format": {"template": 3}}, "row format: template 3 must hold {prompt} once"),
        ({"in_format": {"system": 3}}, "row format: system is 3"),
        ({"in_format": {"chat": "no"}}, "row format: chat is 'no': give true or false"),
        ({"in_format": {"system": "\udce9"}}, "row format: system holds half of a letter"),
        ({"in_format": {"template": "\ud83d{prompt}"}}, "row format: template holds half of a letter"),
        ({"rows": 3}, "safety rows are 3"),
        ({"rows": {}}, "safety rows are {}"),
        ({"in_format": [{"template": "no place"}]}, "row format: template 'no place' must hold {prompt} once"),
    ],
)
def test_what_cannot_be_is_refused_with_its_value(settings, says):
    with pytest.raises(ConfigError, match=f"correction 'replay': {says}"):
        SafeMergeCallback(corrections=[{"replay": settings}])


@pytest.mark.parametrize("name", ["rows", "prompts", "in_format", "max_share"])
@pytest.mark.parametrize("beside", [{}, {"subspace": "s"}])
def test_a_setting_of_a_correction_given_to_the_callback_says_where_it_goes(name, beside):
    place = rf"'{name}' of corrections? .*'replay'.* is given as corrections=\[\{{('replay'|NAME): \{{'{name}': \.\.\."
    with pytest.raises(ConfigError, match=f"setting '{name}' is unknown; {place}"):
        SafeMergeCallback(**{name: 0.1}, **beside)


def test_a_setting_that_a_merge_has_as_well_says_where_it_goes():
    with pytest.raises(
        ConfigError, match=r"every is 2, which is of a merge.*; 'every' of correction.*'replay'.* is given"
    ):
        SafeMergeCallback(every=2)


def test_without_a_file_it_is_replay():
    config = SafeMergeCallback().config
    assert not config.measures
    assert not config.merges
    assert config.changes
    (chosen,) = config.chosen_corrections
    assert chosen.settings == ReplaySettings()
    assert SafeMergeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="corrections is empty and there is no subspace"):
        SafeMergeCallback(corrections=[])
    with pytest.raises(ConfigError, match=r"'subspace' is missing, and threshold is 0\.3, which is of a merge"):
        SafeMergeCallback(threshold=0.3, corrections=[{"replay": {}}])
    assert SafeMergeCallback("s").config.corrections is None
    with pytest.raises(ConfigError, match="'subspace' is missing, and corrections hold a merge"):
        SafeMergeCallback(corrections=[{"merge": {"gate": "all"}}])


def _rows_on_the_first_rank_alone(folder):
    world, tokenizer = World.load(folder), transformers.AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    dist.init_process_group("gloo")
    rows = ROWS if dist.get_rank() == 0 else "nowhere.jsonl"
    with pytest.raises(ConfigError, match=r"'nowhere\.jsonl': there is no such file \(on rank 1 of 2\)"):
        world.trainer(Path(folder) / "run", replaying(rows=rows), tokenizer=tokenizer).train()


def test_rows_that_one_rank_lacks_are_refused_on_all(world, chat_tokenizer):
    chat_tokenizer.save_pretrained(world.folder / "tokenizer")
    run_on(2, _rows_on_the_first_rank_alone, world.folder)
