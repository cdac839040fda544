"""One training run under a safety probe: what is asked, what is told of it, and what the rules make of it.

And where the rules stand, in a checkpoint and after a resume.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerControl, TrainerState, TrainingArguments

from ...errors import ConfigError
from ...evaluation.judges import name_of
from ...evaluation.measure import Share
from ...evaluation.probe import Answers, Asking, Questions, ask
from ...evaluation.units import amount, interval
from ...live.faults import Fault, attempt
from ...live.ranks import from_first
from ...record.entries import probe_entry, stop_entry, trigger_entry
from ...record.log import Log
from ...signals.thoughts import ADVICE
from ..checkpoints import put_values, resumed_folders, values_in
from ..run.guarded import GuardedRun
from ..trackers import Trackers
from .rules import Rollback, Standing, Stop, Trigger, costs_too_much, lacking, stops, triggers

WHO = "safemerge probe, "
PART = "probe"
# Where the state was before it was a part of the trainer's own file.
OLDER_FILE = "safety_eval_state.json"
When = Literal["begin", "every", "before", "after", "end"]


@dataclass(frozen=True)
class Rules:
    """What a probe may set off; None: nothing of that kind."""

    rollback: Rollback | None = None
    trigger: Trigger | None = None
    stop: Stop | None = None


@dataclass
class Spent:
    """The seconds that probing has taken; what remains of it after a training."""

    seconds: float = 0.0


@dataclass
class Probing:
    """What one call of `trainer.train()` needs: made once every check has passed. It is the `Witness` of a session."""

    model: Any
    tokenizer: Any
    args: TrainingArguments
    state: TrainerState
    questions: Questions
    asking: Asking
    rules: Rules
    template_settings: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    guard: GuardedRun | None = None
    trackers: Trackers = field(default_factory=Trackers)
    standing: Standing = field(default_factory=Standing)
    spent: Spent = field(default_factory=Spent)
    log: Log = field(default_factory=Log)
    fresh: tuple[int, Answers] | None = None
    before: Answers | None = None

    def look(self, when: When) -> Answers | None:
        """Probe, unless these very weights were probed at this step already; tell what was found. None after a fault.

        The time this takes counts as the probe's alone.
        """
        began, step = time.perf_counter(), self.state.global_step
        if self.fresh is None or self.fresh[0] != step:
            outcome = attempt("probe", lambda: ask(self.model, self.tokenizer, self.questions, self.asking))
            answered, failures = (None, (outcome.error,)) if isinstance(outcome, Fault) else (outcome, outcome.failures)
            if when == "begin":
                self._check_rules(answered, failures)
            self.fresh = (step, answered) if answered else None
            for failure in failures:
                self._lost(step, failure)
        else:
            self.fresh = (step, replace(self.fresh[1], seconds=0.0, failures=()))
        answers = self.fresh[1] if self.fresh else None
        report = attempt("probe", lambda: self._tell(step, when, answers)) if answers else None
        if isinstance(report, Fault):
            self._lost(step, report.error)
        took = time.perf_counter() - began
        self.spent.seconds += took
        if self.guard:
            self.guard.clock.leave_out(took)
        return answers

    def _check_rules(self, answers: Answers | None, failures: Sequence[str]) -> None:
        """Raise ConfigError, before a step is trained, for a rule resting on what the first probe did not measure."""
        for name, rule in vars(self.rules).items():
            if rule and (figure := lacking(rule, answers)):
                unfinished = answers is not None and any(m["unfinished"] for m in answers.measures)
                reasons = [*failures, *([f"responses end within a thought: {ADVICE}"] if unfinished else [])]
                raise ConfigError(
                    f"rule {name} rests on {figure}, which the first probe could not measure "
                    f"({'; '.join(reasons) or 'no response was judged'}), so it could never act: mend that, or leave "
                    "the rule out"
                )

    def after_step(self, control: TrainerControl) -> None:
        """Probe at a step where it is due, and do what the rules ask for."""
        answers = self.look("every")
        if answers and self.rules.trigger:
            reason, self.standing = triggers(self.rules.trigger, self.standing, self.state.global_step, answers)
            if reason:
                self._merge_now(reason)
        latest = self.fresh[1] if self.fresh else None
        if latest and self.rules.stop:
            reason, self.standing = stops(self.rules.stop, self.standing, latest)
            if reason:
                self.log.note(stop_entry(self.state.global_step, reason))
                self.log.say(f"step {self.state.global_step:,}: training ends, {reason}", who=WHO)
                control.should_training_stop = True

    def before_merge(self, step: int) -> None:
        """Probe what is about to be merged."""
        self.before = self.look("before")

    def after_merge(self, step: int) -> str | None:
        """Probe what was merged; return why it must be taken back, if it must."""
        before, self.fresh = self.before, None
        after = self.look("after")
        if before and after:
            self.log.say(change_line(step, before, after), who=WHO)
        if not (self.rules.rollback and before and after):
            return None
        reason = costs_too_much(self.rules.rollback, before, after)
        # Once it is taken back, the weights are those of before.
        self.fresh = (step, before) if reason else self.fresh
        return reason

    def closing(self) -> None:
        """Probe what the user is left with."""
        if self.args.load_best_model_at_end:
            self.fresh = None
        self.look("end")

    def _merge_now(self, reason: str) -> None:
        """Let the guard check and merge at this step, which its own schedule does not ask for."""
        guard = self.guard
        if guard is None:
            return
        step = self.state.global_step
        self.log.note(trigger_entry(step, reason))
        self.log.say(f"step {step:,}: asks for a merge, {reason}", who=WHO)
        guard.check_now("the safety probe asks for a check of this step")

    def _tell(self, step: int, when: When, answers: Answers) -> None:
        self.log.note(probe_entry(step, when, answers, self.settings() if when == "begin" else None))
        if any(m["unfinished"] for m in answers.measures):
            self.log.warn("thoughts", f"at step {step} responses end within a thought and have no answer: {ADVICE}")
        self.trackers.numbers(self.args, self.state, numbers(answers, when, self.spent.seconds + answers.seconds))
        # What costs no time was said a moment ago; before and after a merge stand on one line.
        if answers.seconds and when not in ("before", "after"):
            self.log.say(line(step, when, answers), who=WHO)

    def settings(self) -> dict[str, Any]:
        """What a reader of the journal must know of how it was asked."""
        asking, counts = self.asking, {name: len(texts) for name, texts in self.questions.prompts.items()}
        judges = {"judge": name_of(asking.judge), "benign_judge": name_of(asking.benign_judge)}
        sizes = {"max_new_tokens": asking.max_new_tokens, "batch_size": asking.batch_size}
        rules = {name: vars(rule) for name, rule in vars(self.rules).items() if rule}
        unit = {"task_unit": asking.task_unit} if asking.task_unit else {}
        template: dict[str, Any] = {"system": self.system} if self.system else {}
        template |= {"chat_template_kwargs": dict(self.template_settings)} if self.template_settings else {}
        return {
            "prompts": counts,
            "benign": sorted(self.questions.benign),
            **judges,
            **sizes,
            **template,
            **unit,
            "rules": rules,
        }

    def _lost(self, step: int, failure: str) -> None:
        words = f"the probe at step {step} lost a measure or its unit, training goes on: {failure}"
        self.log.fault(step, Fault("probe", failure), words)


def numbers(answers: Answers, when: When, total: float) -> dict[str, float]:
    """Return what trackers receive; what was asked before a merge has keys of its own."""
    place = "safemerge/probe/before/" if when == "before" else "safemerge/probe/"
    values = {f"{place}{m['measure']}": m["value"] for m in answers.measures if m["value"] is not None}
    spent = {f"{place}mean_tokens": answers.mean_tokens, f"{place}seconds": answers.seconds}
    return {**values, **spent, "safemerge/probe/seconds_total": total}


def line(step: int, when: When, answers: Answers) -> str:
    """Return all measures in one line, each with its n and interval where it has them."""
    parts = [_words(m) for m in answers.measures]
    if not any(m["kind"] == "task" for m in answers.measures):
        parts.append("task not measured")
    tail = f"{answers.mean_tokens:.1f} tokens a response, {answers.seconds:.1f} s"
    return f"step {step} ({when}): {'; '.join([*parts, tail])}"


def change_line(step: int, before: Answers, after: Answers) -> str:
    """Return what a merge did to every measure, in one line: its value before and after, and their n."""
    past = {m["measure"]: m for m in before.measures}
    parts = [f"{m['measure']} {_change(past.get(m['measure']), m)}" for m in after.measures]
    sizes = sorted({m["n"] for m in after.measures if m["n"]})
    count = f"n {'-'.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))}, " if sizes else ""
    return (
        f"step {step}, before and after the merge: {'; '.join(parts)} ({count}{before.seconds + after.seconds:.1f} s)"
    )


def _value(m: Share | None) -> str:
    return "not known" if m is None or m["value"] is None else amount(m["value"], m["unit"], "%")


def _change(before: Share | None, after: Share) -> str:
    values = [_value(before), _value(after)]
    return _value(after) if values == ["not known"] * 2 else " to ".join(values)


def _words(m: Share) -> str:
    about = [interval(m["low"], m["high"], m["unit"])] if m["low"] is not None and m["high"] is not None else []
    about += [f"n {m['n']}"] if m["n"] and m["value"] is not None else []
    about += [f"{m['unjudged']} not judged"] if m["unjudged"] else []
    about += [f"{m['thoughts']} thoughts cut"] if m["thoughts"] else []
    return f"{m['measure']} {_value(m)}" + (f" ({', '.join(about)})" if about else "")


def save_standing(probing: Probing, folder: Path) -> None:
    """Let the checkpoint that the trainer is writing into `folder` hold where the rules stand; a fault is told once."""
    values = {"seconds": probing.spent.seconds, **vars(probing.standing)}
    done = attempt("state", lambda: put_values(probing.state, PART, values))
    if isinstance(done, Fault):
        words = f"the probe's state of {folder.name} could not be saved ({done.error}): its rules start anew"
        probing.log.warn("state", words)


def load_standing(probing: Probing, args: TrainingArguments, state: TrainerState) -> None:
    """Go on where the rules stood and with the seconds spent, as the checkpoint of the present step has them.

    Warns where it has none and a rule would go on from it. Collective: the first rank reads.
    """
    if state.global_step == 0:
        return
    past = from_first(_read(args, state) if state.is_world_process_zero else None)
    if past is not None:
        probing.standing, probing.spent.seconds = past
    elif probing.rules.trigger or probing.rules.stop:
        words = f"the checkpoint of step {state.global_step} holds no state of SafetyEvalCallback: its rules begin anew"
        probing.log.warn("state", words)


def _read(args: TrainingArguments, state: TrainerState) -> tuple[Standing, float] | None:
    ours = values_in(state, PART)
    if ours is not None:
        return _standing(ours)
    return next((older for older in map(_older, resumed_folders(args, state)) if older is not None), None)


def _standing(values: Any) -> tuple[Standing, float] | None:
    try:
        return Standing(**{k: v for k, v in values.items() if k not in ("seconds", "step")}), float(values["seconds"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _older(folder: Path) -> tuple[Standing, float] | None:
    try:
        return _standing(json.loads((folder / OLDER_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
