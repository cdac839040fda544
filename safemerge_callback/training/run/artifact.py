"""The files of a run that go to a tracker: journal, last plan, card, and the merged adapter."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...decision import MergePlan
from ...io.addresses import source_name
from ...io.card import caveat, escaped, front_matter
from ...record import JOURNAL_FILE
from ...record.progress import Progress
from ..config.settings import SafeMergeConfig
from .card_probe import ProbePair, probe_rows, probes_in

PLAN_FILE, CARD_FILE = "plan.txt", "README.md"
TITLE = "# LoRA adapter, fine-tuned under guard\n"


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind: the last check's plan, the whole run's counts, what was put together, the model.

    `model` is None where it cannot be saved by one process alone. `measures`: whether there were to be checks; `deeds`:
    correction -> what it does, in words that a number of steps follows; `probes`: what a safety probe counted.
    """

    journal: Path
    plan: MergePlan | None
    progress: Progress
    parts: Mapping[str, str | None]
    model: Any = None
    measures: bool = True
    deeds: Mapping[str, str] = field(default_factory=dict)
    probes: ProbePair | None = None

    def write(self, folder: Path) -> None:
        """Write the files into `folder`; raises what saving raises."""
        if self.journal.is_file():
            shutil.copyfile(self.journal, folder / JOURNAL_FILE)
        if self.plan is not None:
            (folder / PLAN_FILE).write_text(f"{self.plan}\n", encoding="utf-8")
        if self.model is not None:
            self.model.save_pretrained(folder)
        # After the adapter, beside which PEFT writes a card of its own.
        (folder / CARD_FILE).write_text(run_card(self), encoding="utf-8")


class Section(NamedTuple):
    """What a model card says of a run, and whether the run changed the model."""

    text: str
    changed: bool


def outcome_of(
    config: SafeMergeConfig,
    journal: Path,
    plan: MergePlan | None,
    progress: Progress,
    unmerged: Mapping[str, str],
    model: Any = None,
    subspace: str | None = None,
) -> Outcome:
    """Return what a run with these settings leaves behind.

    `unmerged`: safety adapter -> what of it merges left out; `subspace`: what may be said of it elsewhere.
    """
    adapters = ", ".join(map(source_name, config.adapters)) or None
    left = "; ".join(f"of {source}: {words}" for source, words in unmerged.items()) or None
    parts = {"subspace": subspace, "safety_adapter": adapters, "left_out": left, "settings": config.words or None}
    deeds = {one.kind.name: one.kind.deed for one in config.chosen_corrections}
    return Outcome(journal, plan, progress, parts, model, config.measures, deeds, probes_in(journal))


def run_section(outcome: Outcome) -> Section:
    """Return the section on this run for a card that somebody else writes; names from outside are escaped."""
    progress = outcome.progress
    says = f"While this adapter was trained, {_done(outcome)}."
    facts = [*_facts(outcome), "", *_answers(outcome)]
    text = "\n".join([f"{_heading(outcome)}\n", f"{says}\n", *facts, _caveat(outcome)])
    return Section(text, progress.merges > 0 or bool(progress.correction_steps))


def _done(outcome: Outcome) -> str:
    """What was done: `SafeMerge checked it once and merged into it once, and safety rows were replayed in 60 steps`."""
    progress = outcome.progress
    merged = f"merged into it {_times(progress.merges)}" if progress.merges else "merged nothing"
    checked = f"SafeMerge checked it {_times(progress.checks)} and {merged}"
    others = [f"{deed} in {_steps(progress, name)}" for name, deed in outcome.deeds.items()]
    untouched = not (progress.merges or progress.task_weights or progress.correction_steps)
    words = ", and ".join([checked, *others] if outcome.measures else others)
    return words + (": these are the weights that training left" if untouched else "")


def _times(count: int) -> str:
    return f"{count} times" if count != 1 else "once"


def _steps(progress: Progress, correction: str) -> str:
    count = progress.correction_steps.get(correction, 0)
    return f"{count} step{'s' * (count != 1)}" if count else "no step"


def _heading(outcome: Outcome) -> str:
    return "## Safety merge" if outcome.measures else "## Safety"


def _caveat(outcome: Outcome) -> str:
    return caveat("The merge" if outcome.measures else "This")


def _answers(outcome: Outcome) -> list[str]:
    return [] if outcome.probes is None else probe_rows(outcome.probes)


def _facts(outcome: Outcome) -> list[str]:
    """The lines of a table of what was put together, and how."""
    plan, progress = outcome.plan, outcome.progress
    left = progress.task_weights.values()
    facts = {
        **outcome.parts,
        **(_counts(progress) if outcome.measures else {}),
        **{name: f"in {_steps(progress, name)}" for name in outcome.deeds},
        "gate": str(plan.gate) if plan else None,
        "method": _method(plan) if plan and progress.merges else None,
        "share of the task's early update left": f"{min(left):.1%} to {max(left):.1%}" if left else None,
        "refusals": None if outcome.probes else "not counted in this run",
    }
    rows = [f"| {key.replace('_', ' ')} | {escaped(value)} |" for key, value in facts.items() if value]
    return ["| | |", "|---|---|", *rows]


def _counts(progress: Progress) -> dict[str, str]:
    events = f"{progress.modules_merged} modules in {progress.merges} event{'s' * (progress.merges != 1)}"
    merges = f"{events}, at steps {', '.join(map(str, progress.merged_steps))}" if progress.merges else "none"
    return {"checks": str(progress.checks), "merges": merges}


def run_card(outcome: Outcome) -> str:
    """Return the card of an adapter that was trained under guard; names from outside are escaped."""
    lines = [front_matter(base_model_of(outcome.model)), TITLE, f"{_heading(outcome)}\n", *_facts(outcome), ""]
    lines += _answers(outcome)
    if not outcome.measures:
        return "\n".join([*lines, f"Every figure is in `{JOURNAL_FILE}`. {_caveat(outcome)}", ""])
    plan, progress = outcome.plan, outcome.progress
    head = ["| module | cosine | null cosine | task weight | decision |", "|---|---:|---:|---:|---|"]
    modules = [_module_row(name, plan, progress) for name in plan.readings] if plan else []
    lines += ["At the last check:", "", *head, *modules, ""]
    words = f"Every reading and reason is in `{JOURNAL_FILE}`, the last check's also in `{PLAN_FILE}`."
    return "\n".join([*lines, f"{words} {_caveat(outcome)}", ""])


def _method(plan: MergePlan) -> str:
    how = plan.how
    words = f"{how.method}, space {how.space}, weights {how.weights[0]:g} / {how.weights[1]:g}"
    return words + (" (soft)" if plan.gate.soft else "")


def _module_row(name: str, plan: MergePlan, progress: Progress) -> str:
    reading, verdict = plan.readings[name], plan.verdicts[name]
    numbers = (reading.cosine, reading.null_cosine, progress.task_weights.get(name, 1.0))
    shown = " | ".join(f"{n:.4f}" if math.isfinite(n) else "not finite" for n in numbers)
    return f"| {escaped(name)} | {shown} | {'merge' if verdict.merge else 'keep'} |"


def base_model_of(model: Any) -> str | None:
    """Return what the configs of a model's adapters call their base; None where they do not, or there is no adapter."""
    configs = getattr(model, "peft_config", None) or {}
    base = next((c.base_model_name_or_path for c in configs.values()), None)
    return str(base) if base else None
