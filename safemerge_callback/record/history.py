"""A journal as a history: module x step -> what was read there, and what was done about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ..decision import BAND, mean_moved
from ..errors import JournalError
from ..evaluation.units import amount, interval
from ..io.paths import as_path
from .journal import JOURNAL_FILE

# The trainer's own measure, beside what was asked.
LOSS = "eval_loss"
# The correction that has a line of its own in a journal.
MERGE = "merge"


class Cell(NamedTuple):
    """One module at one check.

    `state` is `measured`, `broken` (an update that is not finite: the cosine is NaN), or `still` (it has not moved, or
    aligned and unaligned are equal there: the cosine is 1.0 by convention and says nothing). `update_norm` is s·‖B·A‖,
    `reason` the gate's, in words; `merge` whether it selected the module; `limit` the cosine that the gate merged below
    in this module, NaN for a gate that has none. `signed_z` is the signed cosine in standard deviations of an unrelated
    update's, NaN where the journal has none.
    """

    cosine: float
    null_cosine: float
    state: str
    update_norm: float = math.nan
    merge: bool = False
    reason: str = ""
    limit: float = math.nan
    signed_z: float = math.nan

    @property
    def moved(self) -> float:
        """How far the update goes along V, `signed_z` times its norm; NaN where the journal has no `signed_z`."""
        return self.signed_z * self.update_norm

    @property
    def margin(self) -> float:
        """How far the cosine lies above what the gate merges below; the cosine itself where there is no such value."""
        return self.cosine if math.isnan(self.limit) else self.cosine - self.limit


class Measured(NamedTuple):
    """One figure of a probe in its `unit`: a `share` lies in [0, 1] at all probes of the run, others may be any number.

    `kind` is harm, over_refusal, task or coherence; `n` how many responses count, 0 where that is not known, of which
    `incoherent` were neither refusal nor answer; `unjudged` ones are not among them. `thoughts` held thoughts, which
    were cut, `unfinished` ended within one. `outcomes` and `prompts`: a letter a prompt and the digest of the prompts,
    as a `Share` has them, empty where the journal has none. NaN where there is no such value.
    """

    measure: str
    kind: str
    n: int
    value: float
    low: float
    high: float
    incoherent: int = 0
    unjudged: int = 0
    unit: str = ""
    thoughts: int = 0
    unfinished: int = 0
    outcomes: str = ""
    prompts: str = ""

    @property
    def text(self) -> str:
        """The figure in words, as `71.9 % (60 to 81), n = 64` or `36.5 BLEU`."""
        if math.isnan(self.value):
            return "not known"
        ends = f" ({self.interval})" if self.interval else ""
        return f"{amount(self.value, self.unit)}{ends}{f', n = {self.n}' if self.n else ''}"

    @property
    def interval(self) -> str:
        """The ends of the interval, as `60 to 81`; nothing where there is none."""
        return "" if math.isnan(self.low) or math.isnan(self.high) else interval(self.low, self.high, self.unit)


class Probe(NamedTuple):
    """The model asked at `step`; `when` is begin, every, before, after (a merge event) or end.

    `mean_tokens` is a response's mean length, `settings` how it was asked, where the journal says so.
    """

    step: int
    when: str
    seconds: float
    measures: tuple[Measured, ...]
    mean_tokens: float
    settings: Mapping[str, Any] = MappingProxyType({})


class Event(NamedTuple):
    """What the rules did: `kind` is rollback, undo, trigger or stop, `modules` those whose merge was taken back."""

    step: int
    kind: str
    reason: str
    modules: tuple[str, ...] = ()


class Best(NamedTuple):
    """The best model, reloaded at the end of a run and merged at `step`; None for a number that is not known.

    `checkpoint` is its folder's name, `metric` what it was chosen by, the others its evaluation loss.
    """

    step: int
    checkpoint: str
    metric: float | None
    loss_before: float | None
    loss_after: float | None


class TermReading(NamedTuple):
    """What a gradient term came to over `steps` optimizer steps: its mean loss, its `weight`, the seconds it took.

    `norm`: of its weighted gradient in the last of them, before clipping, and `cosine` that gradient's to the task's;
    NaN where they are not known. `figures`: the term's own, by name.
    """

    weight: float
    loss: float
    steps: int
    seconds: float = math.nan
    norm: float = math.nan
    cosine: float = math.nan
    figures: Mapping[str, float] = MappingProxyType({})

    def numbers(self) -> dict[str, float]:
        """Return what a tracker shows of it, by name: what is finite."""
        named = {"loss": self.loss, "seconds": self.seconds, "norm": self.norm, "cosine": self.cosine}
        return {key: value for key, value in {**self.figures, **named}.items() if math.isfinite(value)}


@dataclass
class History:
    """What happened in a run, by module and step; `read_history` makes it.

    `cells`: (module, step) -> reading; where a step was checked twice, the later one. `merges`: (module, step) -> the
    share of the task's update that was left after it; those in `undone` were taken back, with the share there is then,
    and `before` has the share before it. `corrections`: the names of those that changed a module at a step, in their
    order, where that was not the merge alone. `residuals`: (module, step) -> the share of a new update that did not fit
    the rank. `gate`, `threshold`, `num_layers` and `knob` (the one that says how much the gate merges): of the last
    check; `how`: of the last merge. `starts` and `end`: the journal's own entries. `faults`: one line each. `seconds`:
    spent on checks, merges and other changes; `check_seconds`, `merge_seconds` and, by correction, `change_seconds` of
    it; `prepared`: by correction, the seconds before the first step that it took to ready itself. `best`: what the last
    merge did to a reloaded best model. `terms`: gradient term -> step -> what it came to.
    """

    title: str
    cells: dict[tuple[str, int], Cell] = field(default_factory=dict)
    merges: dict[tuple[str, int], float] = field(default_factory=dict)
    gate: str = ""
    threshold: float = math.nan
    num_layers: int | None = None
    knob: float | None = None
    how: str = ""
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    undone: dict[tuple[str, int], float] = field(default_factory=dict)
    residuals: dict[tuple[str, int], float] = field(default_factory=dict)
    before: dict[tuple[str, int], float] = field(default_factory=dict)
    corrections: dict[tuple[str, int], tuple[str, ...]] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    starts: list[Mapping[str, Any]] = field(default_factory=list)
    end: Mapping[str, Any] = field(default_factory=dict)
    check_seconds: float = 0.0
    merge_seconds: float = 0.0
    change_seconds: dict[str, float] = field(default_factory=dict)
    prepared: dict[str, float] = field(default_factory=dict)
    best: Best | None = None
    terms: dict[str, dict[int, TermReading]] = field(default_factory=dict)

    @cached_property
    def modules(self) -> list[str]:
        """Every module, in the order of the journal."""
        return list(dict.fromkeys(name for name, _ in [*self.cells, *self.merges]))

    @cached_property
    def steps(self) -> list[int]:
        """Every step that was checked or at which something was changed, ascending."""
        return sorted({step for _, step in [*self.cells, *self.merges]})

    @cached_property
    def checks(self) -> list[int]:
        """Every step that was checked, ascending: modules were measured there, or merged."""
        return sorted({step for _, step in [*self.cells, *self.by_correction[MERGE]]})

    @property
    def losses(self) -> dict[str, dict[int, float]]:
        """Gradient term -> step -> its mean loss."""
        return {name: {step: one.loss for step, one in steps.items()} for name, steps in self.terms.items()}

    @property
    def empty(self) -> bool:
        """Whether there is nothing yet to tell of: no check, change, probe, gradient term or fault."""
        return not (self.cells or self.merges or self.probes or self.terms or self.faults)

    @property
    def ended(self) -> bool:
        """Whether the run is over; one with a probe but no merge callback says so by its last probe."""
        return bool(self.end) or (not self.starts and bool(self.probes) and self.probes[-1].when == "end")

    @property
    def rule(self) -> str:
        """The gate in words, as `threshold 0.35`; empty where nothing was checked."""
        if not self.gate:
            return ""
        return f"gate {self.gate}" if self.knob is None else f"gate {self.gate} {self.knob:g}"

    @cached_property
    def limit(self) -> float:
        """The one cosine that the gate merged below in all modules of the last check; NaN where each has its own."""
        last = max((step for _, step in self.cells), default=None)
        limits = {cell.limit for (_, step), cell in self.cells.items() if step == last}
        return limits.pop() if len(limits) == 1 else math.nan

    @cached_property
    def by_correction(self) -> dict[str, dict[tuple[str, int], bool]]:
        """Correction -> (module, step) -> whether what it changed there was taken back; the merge first, always.

        Of several at one step the last is taken back.
        """
        keys: dict[str, dict[tuple[str, int], bool]] = {MERGE: {}}
        for key in self.merges:
            *earlier, last = self.corrections_at(*key)
            for name in earlier:
                keys.setdefault(name, {})[key] = False
            keys.setdefault(last, {})[key] = key in self.undone
        return keys

    def corrections_at(self, module: str, step: int) -> tuple[str, ...]:
        """Return the names of the corrections that changed a module at a step, in their order; empty for none."""
        key = module, step
        return self.corrections.get(key, (MERGE,)) if key in self.merges else ()

    @cached_property
    def merged_modules(self) -> set[str]:
        """Every module that was merged at least once."""
        return {name for name, _ in self.by_correction[MERGE]}

    @cached_property
    def moved(self) -> dict[int, float]:
        """Step -> the mean of `moved` over the modules that have moved, where that of each is known."""
        by_step: dict[int, list[float | None]] = {}
        for (_, step), cell in self.cells.items():
            if cell.state == "measured":
                by_step.setdefault(step, []).append(None if math.isnan(cell.moved) else cell.moved)
        means = {step: mean_moved(by_step.get(step, ())) for step in self.steps}
        return {step: mean for step, mean in means.items() if mean is not None}

    @property
    def moved_words(self) -> str:
        """What the last mean of `moved` went with elsewhere; nothing where it is not known."""
        if not self.moved:
            return ""
        return BAND.words(self.moved[max(self.moved)], self._adapter_merged)

    @property
    def _adapter_merged(self) -> bool:
        settings = self.starts[-1].get("config") if self.starts else None
        named = isinstance(settings, Mapping) and settings.get("safety_adapter")
        return bool(named) and not all(self.by_correction[MERGE].values())

    @cached_property
    def task_weights(self) -> dict[str, dict[int, float]]:
        """Module -> step -> the share of its own update that is left from then on, where a merge changed it."""
        shares: dict[str, dict[int, float]] = {}
        for (name, step), share in sorted(self.merges.items(), key=lambda item: item[0][1]):
            shares.setdefault(name, {})[step] = self.undone.get((name, step), share)
        return shares

    @cached_property
    def by_module(self) -> dict[str, dict[int, Cell]]:
        """Module -> step -> its reading, steps ascending."""
        cells: dict[str, dict[int, Cell]] = {name: {} for name in self.modules}
        for (name, step), cell in sorted(self.cells.items(), key=lambda item: item[0][1]):
            cells[name][step] = cell
        return cells


# What a history works out of its fields once, until an entry is added.
DERIVED = tuple(name for name, value in vars(History).items() if isinstance(value, cached_property))


def title_of(path: Path) -> str:
    """Return what a journal's run is called: its folder, or the file where that has a name of its own."""
    resolved = path.resolve()
    return resolved.parent.name if resolved.name == JOURNAL_FILE else resolved.stem


def journal_in(source: str | Path) -> Path:
    """Return the journal of a run's folder, or the path that was given; JournalError for a folder without one."""
    path = as_path(source, "journal", error=JournalError)
    if not path.is_dir():
        return path
    if (path / JOURNAL_FILE).is_file():
        return path / JOURNAL_FILE
    below = sorted(path.glob(f"*/{JOURNAL_FILE}"))
    hint = f"; there is one in {below[0].parent.name!r}" if below else ""
    raise JournalError(f"folder {str(path)!r} holds no {JOURNAL_FILE}{hint}: give a run's folder, or the journal.")
