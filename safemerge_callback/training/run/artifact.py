"""The files of a run that go to a tracker: journal, last plan, card, and the merged adapter."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...decision import MergePlan
from ...record import JOURNAL_FILE
from ...record.card import CAVEAT, escaped, front_matter
from ...record.progress import Progress

PLAN_FILE, CARD_FILE = "plan.txt", "README.md"
TITLE = "# LoRA adapter, fine-tuned under guard\n"


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind: the last check's plan, the whole run's counts, what was put together, the model.

    `model` is None where it cannot be saved by one process alone.
    """

    journal: Path
    plan: MergePlan | None
    progress: Progress
    parts: Mapping[str, str | None]
    model: Any = None

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
    """What a model card says of a run, and whether anything was merged."""

    text: str
    merged: bool


def run_section(outcome: Outcome) -> Section:
    """Return the section on this run for a card that somebody else writes; names from outside are escaped."""
    progress = outcome.progress
    done = f"{progress.checks} times" if progress.checks != 1 else "once"
    merged = f"merged into it {progress.merges} times" if progress.merges != 1 else "merged into it once"
    untouched = "" if progress.task_weights else ": these are the weights that training left"
    merged = merged if progress.merges else f"merged nothing{untouched}"
    says = f"While this adapter was trained, SafeMerge checked it {done} and {merged}."
    text = "\n".join(["## Safety merge\n", f"{says}\n", *_facts(outcome), "", CAVEAT])
    return Section(text, progress.merges > 0)


def _facts(outcome: Outcome) -> list[str]:
    """The lines of a table of what was put together, and how."""
    plan, progress = outcome.plan, outcome.progress
    events = f"{progress.modules_merged} modules in {progress.merges} event{'s' * (progress.merges != 1)}"
    left = progress.task_weights.values()
    facts = {
        **outcome.parts,
        "checks": str(progress.checks),
        "merges": f"{events}, at steps {', '.join(map(str, progress.merged_steps))}" if progress.merges else "none",
        "gate": str(plan.gate) if plan else None,
        "method": _method(plan) if plan and progress.merges else None,
        "share of the task's early update left": f"{min(left):.1%} to {max(left):.1%}" if left else None,
    }
    rows = [f"| {key.replace('_', ' ')} | {escaped(value)} |" for key, value in facts.items() if value]
    return ["| | |", "|---|---|", *rows]


def run_card(outcome: Outcome) -> str:
    """Return the card of an adapter that was merged into while it was trained; names from outside are escaped."""
    plan, progress = outcome.plan, outcome.progress
    head = ["| module | cosine | null cosine | task weight | decision |", "|---|---:|---:|---:|---|"]
    modules = [_module_row(name, plan, progress) for name in plan.readings] if plan else []
    lines = [front_matter(_base_model(outcome.model)), TITLE, "## Safety merge\n"]
    lines += [*_facts(outcome), "", "At the last check:", "", *head, *modules, ""]
    lines += [f"Every reading and reason is in `{JOURNAL_FILE}`, the last check's also in `{PLAN_FILE}`. {CAVEAT}", ""]
    return "\n".join(lines)


def _method(plan: MergePlan) -> str:
    how = plan.how
    words = f"{how.method}, space {how.space}, weights {how.weights[0]:g} / {how.weights[1]:g}"
    return words + (" (soft)" if plan.gate.soft else "")


def _module_row(name: str, plan: MergePlan, progress: Progress) -> str:
    reading, verdict = plan.readings[name], plan.verdicts[name]
    numbers = (reading.cosine, reading.null_cosine, progress.task_weights.get(name, 1.0))
    shown = " | ".join(f"{n:.4f}" if math.isfinite(n) else "not finite" for n in numbers)
    return f"| {escaped(name)} | {shown} | {'merge' if verdict.merge else 'keep'} |"


def _base_model(model: Any) -> str | None:
    configs = getattr(model, "peft_config", None) or {}
    base = next((c.base_model_name_or_path for c in configs.values()), None)
    return str(base) if base else None
