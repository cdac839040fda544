import pytest

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.probe import Answers
from safemerge_callback.training.probe.rules import (
    Rollback,
    Standing,
    Stop,
    Trigger,
    as_rule,
    costs_too_much,
    stops,
    triggers,
)


def row(measure, kind, value, n=10, unit=""):
    blank = {"low": None, "high": None, "incoherent": 0, "unjudged": 0, "unit": unit}
    return {"measure": measure, "kind": kind, "value": value, "n": n, **blank}


def answers(harm=None, task=None, loss=None, unit="", **harms):
    harms = harms if harm is None else {"bad_refused": harm}
    rows = [row(name, "harm", value) for name, value in harms.items()]
    rows += [row("task", "task", task, None, unit)] if task is not None else []
    rows += [row("eval_loss", "task", loss, None)] if loss is not None else []
    return Answers(tuple(rows), 3.0, 0.1)


@pytest.mark.parametrize(
    ("rule", "before", "after", "words"),
    [
        (Rollback(task=0.02), answers(task=0.9), answers(task=0.85), "score fell from 0.9 to 0.85, more than the 0.02"),
        (Rollback(task=0.05), answers(task=0.9), answers(task=0.86), None),
        # in the unit that the score has; a share as the rule's own setting, a part of 1
        (
            Rollback(task=2),
            answers(task=36.5, unit="BLEU"),
            answers(task=33.1, unit="BLEU"),
            "from 36.5 to 33.1 BLEU, mo",
        ),
        (Rollback(task=0.1), answers(task=-0.3), answers(task=-1.25), "from -0.3 to -1.25, more than the 0.1"),
        (Rollback(task=5), answers(task=123456), answers(task=123450), "from 123456 to 123450, more than the 5"),
        (Rollback(task=0.1), answers(task=0.9, unit="share"), answers(task=0.5, unit="share"), "from 0.9 to 0.5, more"),
        (Rollback(task=0.05), answers(task=0.9), answers(task=0.99), None),
        (Rollback(task=0.05), answers(), answers(task=0.1), None),
        (Rollback(task=0.05), answers(task=0.9, loss=1), answers(loss=9), None),
        (Rollback(eval_loss=0.1), answers(loss=1.0), answers(loss=1.2), "loss rose from 1 to 1.2, more than the 0.1"),
        (Rollback(eval_loss=0.1), answers(loss=1.0, task=1), answers(loss=1.05, task=0), None),
        (Rollback(task=0, eval_loss=0), answers(task=1, loss=1), answers(task=1, loss=1), None),
        (Rollback(task=1, eval_loss=0), answers(task=1, loss=1), answers(task=1, loss=2), "the evaluation loss rose"),
    ],
)
def test_a_merge_that_costs_too_much_is_taken_back(rule, before, after, words):
    reason = costs_too_much(rule, before, after)
    assert (reason is None) if words is None else (words in reason)


def fired(rule, shares, every=10):
    standing, steps = Standing(), []
    for step, share in enumerate(shares, 1):
        reason, standing = triggers(rule, standing, step * every, answers(share))
        steps += [step * every] if reason else []
    return steps


def test_a_trigger_fires_under_its_share():
    assert fired(Trigger(0.8), [0.9, 0.8, 0.79, 0.5, 1.0, 0.0]) == [30, 40, 60]


def test_a_trigger_waits_for_its_cooldown():
    assert fired(Trigger(0.8, cooldown=20), [0.5] * 6) == [10, 40]
    assert fired(Trigger(0.8, cooldown=19), [0.5] * 6) == [10, 30, 50]


def test_a_trigger_with_hysteresis_waits_until_the_share_was_high_again():
    assert fired(Trigger(0.8, rearm=0.9), [0.7, 0.85, 0.7, 0.9, 0.7, 0.7]) == [10, 50]
    assert fired(Trigger(0.8, rearm=0.9, cooldown=40), [0.7, 0.95, 0.7, 0.95, 0.7, 0.7]) == [10, 60]


def test_shares_are_over_all_harmful_prompts_or_of_the_measure_named():
    found = answers(a_refused=0.5, b_refused=1.0)
    reason, _ = triggers(Trigger(0.8), Standing(), 5, found)
    assert reason == "the share of harmful prompts refused is 75.0%, below 80.0%"
    assert triggers(Trigger(0.7), Standing(), 5, found)[0] is None
    assert triggers(Trigger(0.7, measure="a_refused"), Standing(), 5, found)[0] == "a_refused is 50.0%, below 70.0%"
    assert stops(Stop(0.7, measure="b_refused"), Standing(), found)[0] is None


def test_nothing_judged_sets_nothing_off():
    assert triggers(Trigger(0.8), Standing(), 5, answers(None)) == (None, Standing())
    assert stops(Stop(0.8), Standing(low=3), answers(None)) == (None, Standing(low=3))


def test_stop_waits_for_its_patience_in_a_row():
    rule, standing, said = Stop(0.5, patience=2), Standing(), []
    for share in (0.4, 0.6, 0.4, 0.4):
        reason, standing = stops(rule, standing, answers(share))
        said.append(reason)
    assert said[:3] == [None] * 3
    assert said[3] == "the share of harmful prompts refused is 40.0%, below 50.0% at 2 probes in a row"


def test_rules_from_mappings():
    assert as_rule(Trigger, {"below": 0.8, "rearm": 0.9}) == Trigger(0.8, rearm=0.9)
    assert as_rule(Stop, Stop(0.5)) == Stop(0.5)
    assert as_rule(Rollback, None) is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rollback(), "rollback allows everything"),
        (lambda: Rollback(task=-0.1), r"rollback task is -0.1: give a number of at least 0"),
        (lambda: Rollback(eval_loss=float("nan")), "rollback eval_loss is nan"),
        (lambda: Trigger(0.0), "trigger below is 0.0: give a share above 0"),
        (lambda: Trigger(1.5), "trigger below is 1.5"),
        (lambda: Trigger(0.8, rearm=0.7), r"trigger rearm is 0.7: give a share from below \(0.8\) to 1"),
        (lambda: Trigger(0.8, cooldown=-1), "trigger cooldown is -1"),
        (lambda: Stop(2), "stop below is 2"),
        (lambda: Stop(0.5, patience=0), "stop patience is 0"),
        (
            lambda: as_rule(Stop, {"below": 0.5, "patiance": 2}),
            "stop has no setting 'patiance'; did you mean 'patience'",
        ),
        (lambda: as_rule(Stop, 0.5), r"stop is 0.5: give Stop\(...\) or a mapping"),
        (lambda: as_rule(Stop, {}), "stop lacks 'below'"),
    ],
)
def test_rules_that_mean_nothing_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
