import warnings

import pytest
import torch

from safemerge_callback import SafetyEvalCallback
from safemerge_callback.errors import ConfigError
from safemerge_callback.training import Rollback, Stop, Trigger
from tests.support.judges import Says
from tests.support.replay import replaying

SETS = {"prompts": {"bad": ["a b", "c d e", "f"]}, "benign": {"good": ["x y", "z"]}}


@pytest.fixture
def probe(chat_tokenizer):
    def make(**changed):
        given = {"every": 2, "max_new_tokens": 4, "tokenizer": chat_tokenizer, "quiet": True, **SETS, **changed}
        return SafetyEvalCallback(**given)

    return make


def kinds(runs, folder, *wanted):
    return [(e["kind"], e["step"]) for e in runs.entries(folder) if e["kind"] in wanted]


def whens(runs, folder):
    return [(e["when"], e["step"]) for e in runs.entries(folder, "probe")]


def test_when_it_asks_without_a_guard_and_what_is_recorded(world, runs, tmp_path, probe, capsys):
    asked = probe(
        quiet=False, task=lambda model, tokenizer: {"measure": "acc", "value": 0.5, "n": 4, "low": 0.2, "high": 0.8}
    )
    trainer = world.trainer(tmp_path, asked)
    trainer.train()
    assert whens(runs, tmp_path) == [("begin", 0), ("every", 2), ("every", 4), ("every", 6), ("end", 6)]
    first, *_, last = runs.entries(tmp_path, "probe")
    assert [m["measure"] for m in first["measures"]] == ["bad_refused", "good_refused", "coherence", "acc"]
    assert first["settings"]["prompts"] == {"bad": 3, "good": 2}
    assert first["settings"]["judge"] == "keywords"
    assert first["seconds"] > 0
    assert last["seconds"] == 0, "these weights were probed a moment before"
    assert last["measures"] == runs.entries(tmp_path, "probe")[3]["measures"]
    logged = [e for e in trainer.state.log_history if "safemerge/probe/bad_refused" in e]
    assert [e["step"] for e in logged] == [0, 2, 4, 6, 6]
    assert logged[0]["safemerge/probe/acc"] == 0.5
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("safemerge probe")]
    assert len(lines) == 4, "what was said a moment before is not said again"
    assert "step 0 (begin): bad_refused 0.0% (0 to 56, n 3); good_refused 0.0% (0 to 66, n 2); coherence" in lines[0]
    assert "; acc 0.5 (0.2 to 0.8, n 4); " in lines[0]
    assert asked.seconds >= sum(e["seconds"] for e in runs.entries(tmp_path, "probe"))


@pytest.mark.parametrize("first", [True, False], ids=["probe first", "guard first"])
def test_before_and_after_each_merge_of_a_guard_wherever_it_stands(world, runs, tmp_path, probe, first):
    guard, asked = world.guard(every=2, at_train_end=False), probe(every=3)
    world.trainer(tmp_path, *((asked, guard) if first else (guard, asked))).train()
    assert whens(runs, tmp_path) == [
        ("begin", 0),
        ("before", 2),
        ("after", 2),
        ("every", 3),
        ("before", 4),
        ("after", 4),
        *([("every", 6)] if first else []),
        ("before", 6),
        ("after", 6),
        *([] if first else [("every", 6)]),
        ("end", 6),
    ]
    entries = runs.entries(tmp_path)
    assert entries[0]["kind"] == "start"
    assert entries[-1]["kind"] == "end"
    merge = next(i for i, e in enumerate(entries) if e["kind"] == "merge")
    assert [entries[i].get("when") for i in (merge - 1, merge + 1)] == ["before", "after"]
    assert len(runs.entries(tmp_path, "start")) == 1


def test_its_time_is_its_own(world, runs, tmp_path, probe):
    import time

    def slow(model, tokenizer):
        time.sleep(0.2)
        return 1.0

    guard, asked = world.guard(every=2, at_train_end=False), probe(every=0, task=slow)
    trainer = world.trainer(tmp_path, guard, asked)
    began = time.perf_counter()
    trainer.train()
    took = time.perf_counter() - began
    end = runs.entries(tmp_path, "end")[0]
    assert asked.seconds > 7 * 0.2
    # Six of the seven probes stand around a merge: with them in it this would be 1.2 s and more.
    assert guard.seconds < 6 * 0.2
    assert end["training_seconds"] + asked.seconds < took + 0.2


def test_a_final_merge_is_probed_and_the_end_is_what_the_user_is_left_with(world, runs, tmp_path, probe):
    saving = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    guard = world.guard(every=0)
    world.trainer(tmp_path, probe(every=0), guard, **saving, **best).train()
    found = whens(runs, tmp_path)
    assert found[0] == ("begin", 0)
    assert found[-1] == ("end", 6)
    assert found.count(("before", 6)) == found.count(("after", 6)) == 2
    assert runs.entries(tmp_path)[-1]["kind"] == "end"
    assert runs.entries(tmp_path, "probe")[-1]["seconds"] > 0


def falling(*scores):
    left = list(scores)
    return lambda model, tokenizer: left.pop(0) if len(left) > 1 else left[0]


def test_a_merge_that_costs_too_much_is_taken_back(world, runs, tmp_path, probe):
    """The second of three: the first and the last stand."""
    watch = runs.Recorder()
    task = falling(1.0, 1.0, 0.99, 0.99, 0.5, 0.9, 0.9, 0.9)
    asked = probe(every=0, task=task, rollback=Rollback(task=0.1))
    guard = world.guard(every=2)
    world.trainer(tmp_path, guard, asked, watch).train()
    assert kinds(runs, tmp_path, "merge", "rollback") == [("merge", 2), ("merge", 4), ("rollback", 4), ("merge", 6)]
    undone = runs.entries(tmp_path, "rollback")[0]
    assert undone["reason"] == "the task's score fell from 0.99 to 0.5, more than the 0.1 allowed"
    assert len(undone["modules"]) == 4
    weights = [m["task_weight"] for m in runs.entries(tmp_path, "merge")[-1]["modules"]]
    assert weights == pytest.approx([0.8 * 0.8] * 4)
    assert guard.progress.merged_steps == [2, 6]
    assert runs.entries(tmp_path, "end")[0]["merges"] == 2
    assert (tmp_path / "_pre_merge").is_dir()


def test_a_rise_of_the_evaluation_loss_takes_a_merge_back(world, runs, tmp_path, probe, chat_tokenizer):
    trainer = world.trainer(tmp_path, world.guard(every=2, weights=[0.05, 1.0]))
    loss = Rollback(eval_loss=0.0)
    trainer.add_callback(probe(every=0, eval_batches=trainer.get_eval_dataloader, rollback=loss))
    with pytest.warns(UserWarning, match=r"3 merges in 6 steps \(every=2\) leave 0\.013% of what the task trains"):
        trainer.train()
    losses = {e["when"]: [] for e in runs.entries(tmp_path, "probe")}
    for entry in runs.entries(tmp_path, "probe"):
        value = next(m["value"] for m in entry["measures"] if m["measure"] == "eval_loss")
        losses[entry["when"]].append((entry["step"], value))
    rises = {step: (x, y) for (step, x), (_, y) in zip(losses["before"], losses["after"], strict=True) if y > x}
    undone = runs.entries(tmp_path, "rollback")
    assert 0 < len(rises) < 4
    assert [e["step"] for e in undone] == list(rises)
    assert all("loss rose from {:.6g} to {:.6g}".format(*rises[e["step"]]) in e["reason"] for e in undone)


def test_a_trigger_merges_when_refusals_fall_and_not_before(world, runs, tmp_path, probe):
    # begin 3 of 3; step 1: 3; step 2: 1, which triggers; then that same answer before, and 3 after
    judge = Says(3, 3, 1, 3, 3, 2, 3)
    guard = world.guard(every=0)
    trainer = world.trainer(tmp_path, probe(every=1, judge=judge, trigger=Trigger(0.7)), guard, max_steps=4)
    trainer.train()
    expected = [(kind, step) for step in (2, 4) for kind in ("trigger", "check", "merge")]
    # the final check finds that this step was merged
    assert kinds(runs, tmp_path, "trigger", "merge", "check") == [*expected, ("check", 4)]
    assert runs.entries(tmp_path, "trigger")[0]["reason"] == (
        "the share of harmful prompts refused is 33.3%, below 70.0%"
    )
    assert guard.progress.merged_steps == [2, 4]


def test_a_triggered_merge_and_a_due_one_at_the_same_step_are_one(world, runs, tmp_path, probe):
    for place in (0, 1):
        folder = tmp_path / str(place)
        callbacks = [world.guard(every=2)]
        callbacks.insert(place, probe(every=2, judge=Says(0), trigger={"below": 0.5}))
        world.trainer(folder, *callbacks, max_steps=4).train()
        assert kinds(runs, folder, "merge") == [("merge", 2), ("merge", 4)]
        assert runs.entries(folder, "error") == []


def test_stop_ends_the_training_and_says_why(world, runs, tmp_path, probe):
    trainer = world.trainer(tmp_path, probe(every=1, judge=Says(3, 3, 1, 1), stop=Stop(0.5, patience=2)))
    trainer.train()
    assert trainer.state.global_step == 3
    assert kinds(runs, tmp_path, "stop") == [("stop", 3)]
    assert "33.3%, below 50.0% at 2 probes in a row" in runs.entries(tmp_path, "stop")[0]["reason"]


def test_where_the_rules_stand_survives_a_resume(world, runs, tmp_path, probe):
    saving = {"save_strategy": "steps", "save_steps": 2}
    rule = {"stop": Stop(0.5, patience=3), "every": 1}
    first = probe(judge=Says(0), **rule)
    world.trainer(tmp_path, first, max_steps=2, **saving).train()
    state = runs.stored(tmp_path / "checkpoint-2", "probe")
    assert state["low"] == 2
    again = probe(judge=Says(0), **rule)
    trainer = world.trainer(tmp_path, again, max_steps=6, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 3
    assert again.seconds > state["seconds"]
    expected = [("begin", 0), ("every", 1), ("every", 2), ("end", 2), ("begin", 2), ("every", 3), ("end", 3)]
    assert whens(runs, tmp_path) == expected


class Broken:
    def refuses(self, prompt, response):
        raise TimeoutError("no answer in 30 s")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"judge": Broken()}, "TimeoutError: no answer in 30 s"),
        ({"task": lambda *_: 1 / 0}, "the task function raised ZeroDivisionError"),
    ],
)
def test_a_judge_or_a_task_that_fails_costs_a_measure_and_one_warning(world, runs, tmp_path, probe, broken, words):
    trainer = world.trainer(tmp_path, probe(**broken))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(w.message) for w in caught if "safemerge" in str(w.message)]
    assert len(told) == 1
    assert "the probe at step 0 lost a measure or its unit, training goes on" in told[0]
    assert words in told[0]
    assert trainer.state.global_step == 6
    errors = runs.entries(tmp_path, "error")
    assert [e["where"] for e in errors] == ["probe"] * 4
    assert all(words in e["error"] for e in errors)
    assert len(runs.entries(tmp_path, "probe")) == 5


def test_generation_that_fails_costs_the_probe_and_not_the_training(world, runs, tmp_path, probe):
    model = world.model()
    asked = probe(rollback={"task": 0.1}, task=lambda *_: 1)

    def breaks(step, model):
        model.generate = lambda **_: 1 / 0

    trainer = world.trainer(tmp_path, runs.Recorder(breaks), world.guard(every=2), asked, model=model)
    with pytest.warns(UserWarning, match=r"the probe at step 2 lost a measure.*ZeroDivisionError"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert whens(runs, tmp_path) == [("begin", 0)]
    assert len(runs.entries(tmp_path, "merge")) == 3, "what was not measured is not taken back"


def test_a_rollback_that_cannot_be_written_is_told_and_the_merge_stands(world, runs, tmp_path, probe):
    guard = world.guard(every=0)
    asked = probe(every=0, task=falling(1.0, 1.0, 0.0), rollback=Rollback(task=0.1))

    def act(step, model):
        def fails(new):
            raise RuntimeError("disk of glass")

        whole = guard.session.writer.write
        calls = []
        guard.session.writer.write = lambda new: whole(new) if not calls and not calls.append(1) else fails(new)

    trainer = world.trainer(tmp_path, runs.Recorder(act), guard, asked, max_steps=1)
    with pytest.warns(UserWarning, match=r"merge at step 1 could not be taken back and stands: RuntimeError: disk"):
        trainer.train()
    assert [e["where"] for e in runs.entries(tmp_path, "error")] == ["rollback"]
    assert guard.progress.merged_steps == [1]


def refused(words):
    return pytest.raises(ConfigError, match=words)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"every": -1}, "every is -1: give an integer of at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"n": True}, "n is True"),
        ({"judge_seconds": 0}, "judge_seconds is 0: give more than 0"),
        ({"prompts": {"bad": ["a", ""]}}, "prompt set 'bad' holds '': give texts"),
        ({"prompts": [["a", "b"]]}, r"prompt set \['a', 'b'\] is no name"),
        ({"rollback": {"task": 0.1}}, "rollback looks at the task's score: give task"),
        ({"task_unit": "share"}, "task_unit is 'share' and there is no task"),
        ({"task": lambda *_: 1, "task_unit": 3}, "task_unit 3 cannot be shown: give 'share' for a part of 1"),
        ({"rollback": {"eval_loss": 0.1}}, r"give eval_batches, such as trainer\.get_eval_dataloader"),
        ({"trigger": {"below": 0.5}, "every": 0}, "trigger needs periodic probes: set every"),
        ({"stop": {"below": 0.5, "measure": "bed_refused"}}, r"stop measure 'bed_refused' .*\['bad_refused'\]"),
        ({"benign_judge": "llamaguard"}, "llamaguard"),
        ({"judge": "keyword"}, "judge 'keyword' is unknown.*did you mean 'keywords'"),
    ],
)
def test_what_does_not_fit_is_refused_when_made(probe, changed, words):
    with refused(words):
        probe(**changed)


@pytest.mark.parametrize(
    ("changed", "guard", "words"),
    [
        ({"trigger": {"below": 0.5}}, None, "rule trigger is set and the trainer has no SafeMergeCallback: add one"),
        ({"rollback": Rollback(task=1), "task": lambda *_: 1}, None, "rule rollback is set"),
        ({"trigger": {"below": 0.5}}, {"gate": "watch"}, "a SafeMergeCallback that never merges"),
        ({"journal": "x.jsonl"}, {}, "journal is 'x.jsonl': the journal is the SafeMergeCallback's"),
        ({"prompts": {"bad": []}}, None, "set 'bad' is empty: give at least one prompt"),
        ({"eval_batches": []}, None, "eval_batches holds no batch"),
        ({"eval_batches": lambda: 1 / 0}, None, "eval_batches cannot be read .ZeroDivisionError"),
        ({"template": "Question:"}, None, "'Question:' has no place for the prompt"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(world, runs, tmp_path, probe, changed, guard, words):
    seen = runs.Recorder()
    guards = [] if guard is None else [world.guard(**guard)]
    with refused(words):
        world.trainer(tmp_path, probe(**changed), *guards, seen).train()
    assert seen.steps == {}


@pytest.mark.parametrize("first", [True, False], ids=["probe first", "guard first"])
def test_beside_a_guard_that_only_replays_it_asks_changes_nothing_and_may_stop(
    world, runs, chat_tokenizer, tmp_path, probe, first
):
    stopping, seen = probe(every=3, stop={"below": 0.5, "patience": 2}, judge=Says(0)), {}
    for name, asked in {"asked": [stopping], "alone": []}.items():
        guard, seen[name] = replaying(batch_size=2), runs.Recorder()
        guards = [*asked, guard] if first else [guard, *asked]
        world.trainer(tmp_path / name, *guards, seen[name], tokenizer=chat_tokenizer, max_steps=8).train()
    assert whens(runs, tmp_path / "asked") == [("begin", 0), ("every", 3), ("every", 6), ("end", 6)]
    assert kinds(runs, tmp_path / "asked", "stop", "check", "merge", "error") == [("stop", 6)]
    assert [e["step"] for e in runs.entries(tmp_path / "asked", "gradient")] == [1, 2, 3, 4, 5, 6]
    assert (max(seen["asked"].steps), max(seen["alone"].steps)) == (6, 8)
    last, same = (seen[name].steps[6] for name in ("asked", "alone"))
    assert all(torch.equal(last[name], same[name]) for name in same)


@pytest.mark.parametrize(("rule", "deed"), [("trigger", "ask for"), ("rollback", "take back")])
def test_a_rule_that_would_merge_is_refused_beside_a_guard_that_only_replays(
    world, runs, chat_tokenizer, tmp_path, probe, rule, deed
):
    settings = {"trigger": {"below": 0.5}, "rollback": {"task": 0.1}}
    asked, seen = probe(task=lambda *_: 1, **{rule: settings[rule]}), runs.Recorder()
    words = f"rule {rule} is set and the trainer has a SafeMergeCallback without a subspace, which makes no merge that "
    with refused(f"{words}it could {deed}: give it the safety-subspace file .*, or leave the rule out"):
        world.trainer(tmp_path, replaying(), asked, seen, tokenizer=chat_tokenizer).train()
    assert seen.steps == {}


def test_sets_by_name_and_by_file(world, runs, tmp_path, probe):
    (tmp_path / "own.txt").write_text("a b\nc d\ne\n")
    (tmp_path / "good.txt").write_text("x y\n")
    own, good = f"harm:{tmp_path / 'own.txt'}", f"benign:{tmp_path / 'good.txt'}"
    asked = probe(prompts={"bad": own}, benign=[good], n=2)
    assert [len(texts) for texts in asked.prompt_sets[0].values()] == [2]
    assert list(asked.prompt_sets[0]) == ["bad"]
    assert asked.prompt_sets[1] == {"good": ["x y"]}
    with refused("is of kind 'benign': give it as benign="):
        probe(prompts=good)
    with refused("is of kind 'harm': give it as prompts="):
        probe(benign=own)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "own.txt").write_text("other\n")
    with refused("prompt set 'own' is given twice"):
        probe(prompts=[own, f"harm:{tmp_path / 'more' / 'own.txt'}"])
    with refused("prompts 'advbanch' are unknown.*did you mean 'advbench'"):
        probe(prompts="advbanch")


def test_two_probes_of_one_guard_are_refused(world, tmp_path, probe):
    with refused("two SafetyEvalCallbacks"):
        world.trainer(tmp_path, probe(), probe(), world.guard()).train()


def test_without_a_tokenizer_or_a_chat_template_it_is_refused_with_what_to_do(world, tmp_path, probe, chat_tokenizer):
    import copy

    with refused("the trainer has no tokenizer .*processing_class"):
        world.trainer(tmp_path, probe(tokenizer=None)).train()
    bare = copy.deepcopy(chat_tokenizer)
    bare.chat_template = None
    with refused("no chat template: .*give `template`"):
        world.trainer(tmp_path, probe(tokenizer=bare)).train()
    world.trainer(tmp_path, probe(tokenizer=bare, template="w1 {prompt} w2"), max_steps=1).train()


def test_the_trainers_own_tokenizer_and_a_journal_of_ones_own(world, runs, tmp_path, chat_tokenizer):
    from transformers import Trainer

    asked = SafetyEvalCallback(**SETS, every=0, max_new_tokens=2, quiet=True, journal=str(tmp_path / "own" / "p.jsonl"))
    settings = world.settings(tmp_path / "out", max_steps=1)
    Trainer(
        world.model(), settings, train_dataset=runs.tokens(), processing_class=chat_tokenizer, callbacks=[asked]
    ).train()
    assert [e["when"] for e in runs.entries(tmp_path / "own", "probe", name="p.jsonl")] == ["begin", "end"]


def test_a_model_that_says_nothing_is_refused(tmp_path, probe):
    with refused("a Linear cannot be asked anything"):
        probe().on_train_begin(None, None, None, model=torch.nn.Linear(2, 2))


def test_what_ends_within_a_thought_is_not_judged_counted_and_told_once(world, runs, tmp_path, probe, thinker, capsys):
    trainer = world.trainer(tmp_path, probe(tokenizer=thinker, every=2, quiet=False, judge=lambda *_: 1 / 0))
    with pytest.warns(UserWarning, match="at step 0 responses end within a thought .*max_new_tokens.*") as told:
        trainer.train()
    assert len([w for w in told if "thought" in str(w.message)]) == 1
    measures = runs.entries(tmp_path, "probe")[1]["measures"]
    counts = [(m["n"], m["value"], m["unjudged"], m["thoughts"], m["unfinished"]) for m in measures[:2]]
    assert counts == [(0, None, 3, 3, 3), (0, None, 2, 2, 2)]
    assert runs.entries(tmp_path, "error") == [], "no judge was asked"
    assert "bad_refused not known (3 not judged, 3 thoughts cut)" in capsys.readouterr().out


def test_settings_for_the_chat_template_turn_thinking_off(world, runs, tmp_path, probe, thinker):
    asked = probe(tokenizer=thinker, chat_template_kwargs={"enable_thinking": False})
    world.trainer(tmp_path, asked, max_steps=1).train()
    entry = runs.entries(tmp_path, "probe")[0]
    assert entry["settings"]["chat_template_kwargs"] == {"enable_thinking": False}
    assert [(m["n"], m["thoughts"]) for m in entry["measures"][:2]] == [(3, 0), (2, 0)]


@pytest.mark.parametrize(
    ("template", "more", "words"),
    [
        ("Hello. ", {}, "the chat template loses the prompt|the chat template loses prompt 1 of 3"),
        ("{{ raise_exception('a system turn first') }}", {}, "lone user's turn .TemplateError: a system turn first"),
        (
            None,
            {"chat_template_kwargs": {"enable_thinkin": False}},
            "'enable_thinkin', which the chat template never",
        ),
    ],
)
def test_a_template_that_does_not_ask_is_refused_before_the_first_step(
    world, runs, tmp_path, probe, thinker, template, more, words
):
    thinker.chat_template, seen = template or thinker.chat_template, runs.Recorder()
    with refused(words):
        world.trainer(tmp_path, probe(tokenizer=thinker, **more), seen).train()
    assert seen.steps == {}


def test_a_tokenizer_of_another_model_is_refused_before_the_first_step(world, runs, tmp_path, probe, chat_tokenizer):
    import copy

    other, seen = copy.deepcopy(chat_tokenizer), runs.Recorder()
    other.add_tokens(["strange"])
    with refused("gives token 64, and the model has rows for 64"):
        world.trainer(tmp_path, probe(tokenizer=other, prompts={"bad": ["strange"]}), seen).train()
    assert seen.steps == {}


class NotThere:
    """A judge that depends on something outside, which is not there."""

    def refuses(self, prompt, response):
        raise AssertionError("it was not there, and is not asked")

    def check_ready(self):
        raise ConfigError("judge 'mine' is not there: start it")


@pytest.mark.parametrize("place", ["judge", "benign_judge"])
@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (
            {"name": "endpoint:m@http://127.0.0.1:9/v1", "retries": 0},
            r"'m' at '127.0.0.1' gives no answer \(Connection",
        ),
        (NotThere(), "'mine' is not there"),
    ],
)
def test_a_judge_that_does_not_answer_is_refused_before_the_first_step(world, tmp_path, probe, judge, words, place):
    trainer = world.trainer(tmp_path, probe(**{place: judge}))
    with pytest.raises(ConfigError, match=words):
        trainer.train()
    assert trainer.state.global_step == 0


def raises(*_):
    raise RuntimeError("no data")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"task": raises, "rollback": {"task": 0.1}}, "rollback rests on the task's score.*RuntimeError: no data"),
        ({"task": lambda *_: "0.5", "rollback": {"task": 0.1}}, "the score is the text '0.5': a number was expected"),
        ({"task": lambda *_: float("nan"), "rollback": {"task": 0.1}}, "task is nan: a finite number"),
        ({"task": lambda *_: {"share": 1}, "rollback": {"task": 0.1}}, "KeyError"),
        ({"task": lambda *_: None, "rollback": {"task": 0.1}}, "the task function raised TypeError"),
        ({"eval_batches": [{"input_ids": 1}], "rollback": {"eval_loss": 0.1}}, "rests on the evaluation loss"),
        ({"judge": Broken(), "trigger": {"below": 0.5}}, "trigger rests on the share of harmful prompts.*no answer in"),
        ({"judge": Broken(), "stop": {"below": 0.5, "measure": "bad_refused"}}, "stop rests on bad_refused"),
        (
            {"every": 7, "trigger": {"below": 0.5}},
            "trigger needs periodic probes, and every=7 gives none in a run of 6",
        ),
        ({"every": 7, "stop": {"below": 0.5}}, "stop needs periodic probes"),
    ],
)
def test_a_rule_on_a_figure_that_is_not_measured_is_refused_before_the_first_step(
    world, runs, tmp_path, probe, changed, words
):
    seen = runs.Recorder()
    with refused(words):
        world.trainer(tmp_path, probe(**changed), world.guard(), seen).train()
    assert seen.steps == {}
    assert runs.entries(tmp_path, "merge") == [] if (tmp_path / "safemerge.jsonl").exists() else True


def test_a_rule_on_thoughts_that_never_end_is_refused_with_what_helps(world, tmp_path, probe, thinker):
    with refused("stop rests on the share of harmful prompts refused.*raise max_new_tokens, or turn thinking off"):
        world.trainer(tmp_path, probe(tokenizer=thinker, stop={"below": 0.5})).train()


@pytest.mark.parametrize(
    "changed",
    [
        {"task": 5},
        {"task": "score"},
        {"task": lambda model: 1.0},
        {"task": lambda model, tokenizer, more: 1.0},
        {"judge": lambda response: True},
        {"benign_judge": lambda a, b, c: True},
        {"judge": type("J", (), {"refuses": lambda self, response: True})()},
        {"judge": type("J", (), {"refuses": True})()},
        {"judge": type("J", (), {"refuses": Says.refuses, "refuse_all": lambda self, responses: []})()},
        {"judge": {"name": "keywords", "phrases": "I cannot"}},
        {"judge": {"name": "keywords", "phrases": ["I cannot", ""]}},
        {"judge": {"name": "keywords", "first": "200"}},
        {"eval_batches": 5},
        {"eval_batches": lambda model: []},
        {"eval_batches": "batches"},
        {"quiet": "no"},
        {"quiet": 0},
        {"seed": "1"},
        {"journal": True},
        {"template": 5},
        {"chat_template_kwargs": "no"},
    ],
)
def test_what_cannot_act_or_means_something_else_is_refused_when_made(probe, changed):
    with refused(": give|cannot be called|is no JSON"):
        probe(**changed)


def test_functions_of_every_kind_are_taken(probe):
    from functools import partial

    class Task:
        def __call__(self, model, tokenizer):
            return 1.0

    for task in (lambda *_: 1, lambda model, tokenizer, more=None: 1, Task(), partial(lambda a, m, t: 1, 0), max):
        probe(task=task)
    probe(judge=Says(1), eval_batches=iter([]))
    probe(judge=str.startswith, eval_batches=lambda: [])
