import pytest
from transformers import TrainerCallback

from safemerge_callback.decision import MergePlan, Reading, Readings
from safemerge_callback.record.progress import Progress
from safemerge_callback.training.config.settings import SafeMergeConfig
from safemerge_callback.training.run.forecast import forecast
from safemerge_callback.training.run.lines import (
    alike_inputs,
    closing_line,
    nothing_merged,
    opening_line,
    unused_inputs,
)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {},
            "gate all, 2 modules, pull 0.2 toward the aligned model, every 167 of 1,000 steps and at the end: 6 merges",
        ),
        ({"every": 0}, "pull 0.2 toward the aligned model, at the end: 1 merge planned, 80% of"),
        ({"safety_adapter": "org/x", "threshold": 0.4}, "gate threshold 0.4, 2 modules, linear 0.8 / 0.2 with org/x,"),
        ({"threshold": 0.4}, "at most 6 merges planned, at least 26% of the task's early update left after them"),
        (
            {"method": "ema"},
            "ema 1 toward the run's average, every 167 of 1,000 steps and at the end: 6 merges planned",
        ),
        ({"method": "project", "every": 0}, "gate all, 2 modules, project, at the end: 1 merge planned"),
        (
            {"from_step": 200, "until_step": 700},
            "every 167 of 1,000 steps from step 200 until step 700 and at the end: 4",
        ),
        ({"method": "pull", "safety_adapter": "x"}, "pull 0.2 toward x,"),
    ],
)
def test_a_run_begins_with_what_it_will_do(changed, says):
    config = SafeMergeConfig.from_dict({"subspace": "s", **changed})
    names = ["layers.0.q_proj", "layers.0.v_proj"]
    line = opening_line(config, forecast(config, names, 1000), 2, 1000)
    assert says in line
    assert len(line) < 200
    assert opening_line(config, forecast(config, names, 1000), 2, 1000, 500).startswith("going on from step 500, gate")


def test_a_run_ends_with_the_next_command_ready_to_be_pasted(tmp_path):
    config = SafeMergeConfig(subspace="s")
    done = Progress(checks=3, merges=2, task_weights={"a": 0.64, "b": 0.8})
    line = closing_line(config, done, 1.25, 0.011, tmp_path / "my run" / "safemerge.jsonl")
    assert line == (
        "done: 3 checks, 2 merges, 64% of the task's early update left (1.2 s, 1.1% of the training). "
        f"See it: safemerge report '{tmp_path / 'my run'}'"
    )
    assert closing_line(config, done, 1.0, 0.0, tmp_path / "own.jsonl").endswith(f"report {tmp_path / 'own.jsonl'}")
    assert "3 checks, NOTHING WAS MERGED (" in closing_line(config, Progress(checks=3), 1.0, 0.0, tmp_path / "x.jsonl")


def test_a_run_without_checks_has_a_page_of_what_was_replayed_and_none_of_nothing(tmp_path):
    journal = tmp_path / "safemerge.jsonl"
    line = closing_line(SafeMergeConfig(), Progress(), 1.25, 0.011, journal)
    assert line == f"done: replay in 0 steps (1.2 s, 1.1% of the training). Its journal: {journal}"
    line = closing_line(SafeMergeConfig(), Progress(correction_steps={"replay": 2}), 1.25, 0.011, journal)
    assert line == f"done: replay in 2 steps (1.2 s, 1.1% of the training). See it: safemerge report {tmp_path}"


@pytest.mark.parametrize(("signed", "side"), [(-0.5, "below -0.55"), (0.5, "not below -0.55")])
def test_the_verdict_is_the_bands(tmp_path, signed, side):
    reading = Reading("m", 0.5, 0.7, 1.0, 4, (8, 8), signed_cosine=signed)
    plan = MergePlan.decide(Readings([reading]), gate="watch")
    line = closing_line(SafeMergeConfig(subspace="s", gate="watch"), Progress(checks=3), 1.0, 0.0, tmp_path, plan)
    assert f"done: 3 checks, moved_mean {8 * signed:+.2f} at the last check, {side}, where " in line


def test_a_run_without_merges_says_which_of_three_things_happened():
    readings = Readings([Reading("m", 0.5, 0.7, 1.0, 4, (8, 8)), Reading("n", 0.4, 0.7, 1.0, 4, (8, 8))])
    none, some = (MergePlan.decide(readings, threshold=t) for t in (0.35, 0.45))
    assert "no check fell within the run" in nothing_merged(Progress(), None)
    assert "gate threshold 0.35 selects none of 2 modules. The closest is 'n' (cosine 0.4000 >= 0.35" in nothing_merged(
        Progress(checks=3), none
    )
    assert "the last check selected 1 of 2 modules, and every merge was taken back" in nothing_merged(Progress(), some)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"gate": "threshold", "threshold": 1e-6},
            r"in 3 checks nothing was merged: gate threshold 1e-06 selects none of 4",
        ),
        (
            {"gate": "opposed", "z_threshold": -1e6},
            r"gate opposed -1e\+06 selects none of 4 modules\. The closest is '.*' \(z ",
        ),
    ],
)
def test_a_run_in_which_nothing_merged_says_so_at_its_end(world, tmp_path, capsys, changed, says):
    with pytest.warns(UserWarning, match=says):
        world.trainer(tmp_path, world.guard(**changed)).train()
    assert "NOTHING WAS MERGED" in capsys.readouterr().out


class Ends(TrainerCallback):
    """Ends a training after its first step, before the first check."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_run_that_ends_before_its_first_check_says_so(world, tmp_path, capsys):
    trainer = world.trainer(tmp_path, world.guard(every=2, at_train_end=False))
    trainer.add_callback(Ends())
    with pytest.warns(UserWarning, match="no check fell within the run"):
        trainer.train()
    assert "NOTHING WAS MERGED" in capsys.readouterr().out


def test_a_loop_that_merged_nothing_is_told_too(tmp_path):
    from safemerge_callback.training import LoopLog

    readings = Readings([Reading("m", 0.5, 0.7, 1.0, 4, (8, 8))])
    for gate, told in (("threshold", True), ("watch", False)):
        with LoopLog(tmp_path / gate) as log:
            log.check(1, MergePlan.decide(readings, gate=gate))
            if told:
                with pytest.warns(UserWarning, match="in 1 check nothing was merged: gate threshold"):
                    log.finish()
            else:
                log.finish()


def said(capsys):
    out = capsys.readouterr().out
    return [line for line in out.splitlines() if line.startswith("safemerge")]


def test_one_line_at_the_start_one_a_merge_one_at_the_end(world, tmp_path, capsys):
    world.trainer(tmp_path / "out", world.guard()).train()
    first, *merges, last = said(capsys)
    assert first.startswith("safemerge: gate all, 4 modules, linear 0.8 / 0.2 with ")
    assert first.endswith(
        "every 2 of 6 steps and at the end: 3 merges planned, 51% of the task's early update left after them"
    )
    assert [line.partition(", moved")[0] for line in merges] == [
        f"safemerge: step {step}: 4 of 4 modules merged" for step in (2, 4, 6)
    ]
    assert merges[1].endswith(", 64% of the task's early update left")
    assert last.startswith("safemerge: done: 3 checks, 3 merges, 51% of the task's early update left, moved_mean ")
    assert last.endswith(f"See it: safemerge report {tmp_path / 'out'}")


def test_watching_says_that_it_changes_nothing(world, tmp_path, capsys):
    world.trainer(tmp_path, world.guard(gate="watch", safety_adapter=None)).train()
    first, *rest, last = [line for line in said(capsys) if "fell below" not in line]
    assert first == "safemerge: gate watch, 4 modules: measured every 2 of 6 steps and at the end, nothing is changed"
    assert rest == []
    assert last.startswith("safemerge: done: 3 checks, moved_mean ")


def test_quiet_says_nothing(world, tmp_path, capsys):
    world.trainer(tmp_path, world.guard(quiet=True)).train()
    assert said(capsys) == []


def grams_said(cosine, unused):
    readings = Readings(Reading(name, 0.5, 0.5, 1.0, 4, (8, 16)) for name in ("a", "b"))
    signals = {"gram_cosine": {"a": cosine, "b": 1.0}, "unused_features": {"a": unused, "b": 0.0}}
    return MergePlan.decide(readings.with_signals(signals), gate="all", method="regmean")


def test_grams_that_agree_and_features_that_were_never_used_are_told():
    plan = grams_said(0.96, 3.0)
    assert alike_inputs(4, plan) == (
        "at step 4 modules are given much the same by the task and by safety rows (mean cosine 0.98): method 'regmean' "
        "has nothing to gain by the difference, and does what pull does at strength 0.75"
    )
    assert unused_inputs(4, plan) == (
        "at step 4 the task used none of 3 of 16 inputs of module 'a' (1 modules have such): of these its "
        "Gram says nothing, and the ridge alone decides"
    )
    assert alike_inputs(4, grams_said(0.8, 0.0)) is None
    assert unused_inputs(4, grams_said(0.8, 0.0)) is None
    plain = MergePlan.decide(Readings([Reading("a", 0.5, 0.5, 1.0, 4, (8, 16))]), gate="all", method="pull")
    assert alike_inputs(4, plain) is unused_inputs(4, plain) is None
