"""The figures that the page's template sets: at a glance, of each module, of each probe, of the run and its costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ...decision import BAND
from ...evaluation.units import SHARE, amount, number
from ...record.history import LOSS, MERGE, Cell, History, Measured, Probe
from ..layout import panels
from ..terms import courses
from ..words import NOTHING, counted, seconds_text, several
from .terms import term_table, term_tiles

KINDS = {
    "harm": "harmful prompts (higher is safer)",
    "over_refusal": "harmless prompts (lower is better)",
    "task": "task",
    "coherence": "coherence",
}


class Tile(NamedTuple):
    """A figure at the head of the page: what it is, its value, and a line beneath."""

    label: str
    value: str
    note: str


class ModuleRow(NamedTuple):
    """A module's row; numbers stay numbers (NaN where there is none), since the page sorts by them.

    `changes`: how often each correction changed it, the merge first, and how often that was taken back.
    """

    name: str
    kind: str
    label: str
    first: float
    last: float
    null: float
    margin: float
    lowest: float
    lowest_at: int | None
    changes: tuple[tuple[int, int], ...]
    left: float
    norm: float
    moved: float
    state: str
    reason: str


def page_figures(history: History) -> dict[str, Any]:
    """Return what the template needs of `history`, by name."""
    return {
        "title": history.title,
        "rule": history.rule,
        "how": history.how,
        "span": _span(history),
        "tiles": tiles(history),
        "rows": module_rows(history),
        "columns": measure_names(history.probes),
        "probes": [_probe_row(probe, measure_names(history.probes)) for probe in history.probes],
        "terms": [term_table(course) for course in courses(history)],
        "happenings": happenings(history),
        "costs": costs(history),
        "sources": sources(history),
        "has_checks": bool(history.steps),
        "has_cosines": bool(history.cells) or bool(history.by_correction[MERGE]),
        "has_moved": bool(history.moved),
        "band": BAND,
        "has_weights": bool(history.merges),
        "change_columns": _change_columns(history),
        "num": lambda value, digits=4: NOTHING if value is None or math.isnan(value) else f"{value:.{digits}f}",
    }


def _change_columns(history: History) -> list[tuple[str, str, str]]:
    """Key, heading and meaning of a column for each correction but the merge."""
    others = [name for name in history.by_correction if name != MERGE]
    return [(f"change-{name}", name, f"how often {name} changed it") for name in others]


def _span(history: History) -> str:
    parts = [f"{course.name} in {several(course.steps, 'step')}" for course in courses(history)]
    if history.steps:
        checks = f", {counted(history.checks, 'check')}" if history.checks else " changed"
        drift = f"{counted(history.modules, 'module')}{checks} at {_steps(history.steps)}"
        parts = [drift, *parts]
    else:
        probed = sorted({probe.step for probe in history.probes})
        parts += [f"{counted(history.probes, 'probe')}{f' at {_steps(probed)}' if probed else ''}"]
        parts = ["no check", *(part for part in parts if part != "0 probes")]
    return f"{', '.join(parts)}; {_state(history)}"


def _steps(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _state(history: History) -> str:
    if not history.ended:
        return "has not ended"
    last = max([*history.steps, *(probe.step for probe in history.probes)], default=0)
    return f"ended at step {history.end.get('step', last)}"


def tiles(history: History) -> list[Tile]:
    """Return the figures that say at a glance how the run went."""
    figures = [] if not history.steps else _drift_tiles(history)
    for course in courses(history):
        figures += [Tile(*tile) for tile in term_tiles(history, course)]
    figures += _probe_tiles(history.probes)
    return [*figures, *_cost_tile(history)]


def _drift_tiles(history: History) -> list[Tile]:
    figures = [*_moved(history), *_cosines(history)]
    figures += [_changes_tile(name, changes) for name, changes in history.by_correction.items()]
    lefts = [shares[max(shares)] for shares in history.task_weights.values()]
    return [*figures, Tile("least task update left", f"{min(lefts, default=1.0):.1%}", "of any module's own update")]


def _cost_tile(history: History) -> Iterator[Tile]:
    """What the callback took in all, where there is one."""
    if not history.steps and not history.end.get("seconds"):
        return
    spent = seconds_text(history.end.get("seconds") or history.seconds)
    of_what = "checks, merges and other changes" if history.change_seconds else "checks and merges"
    yield Tile("cost", spent, share_text(history) or of_what)


def _changes_tile(correction: str, changes: Mapping[tuple[str, int], bool]) -> Tile:
    """How often a correction changed a module: the merge, and each other one apart."""
    label = "module merges" if correction == MERGE else f"module changes by {correction}"
    back = f", {sum(changes.values())} taken back" if any(changes.values()) else ""
    return Tile(label, str(len(changes)), f"in {counted({name for name, _ in changes}, 'module')}{back}")


def _moved(history: History) -> list[Tile]:
    """How far the updates go along V, and which way they point, where the journal says so."""
    last = [cells[max(cells)] for cells in history.by_module.values() if cells]
    figures = []
    if history.moved:
        step, mean = max(history.moved.items())
        figures.append(Tile(f"moved along the alignment, mean at step {step}", f"{mean:+z.2f}", history.moved_words))
    return figures + _direction([cell.signed_z for cell in last if not math.isnan(cell.signed_z)])


def _cosines(history: History) -> list[Tile]:
    measured = {key: cell for key, cell in history.cells.items() if cell.state == "measured"}
    last = [cells[max(cells)] for cells in history.by_module.values() if cells]
    figures = []
    if measured:
        name, step = min(measured, key=lambda key: measured[key].cosine)
        figures.append(Tile("lowest cosine", f"{measured[name, step].cosine:.3f}", f"{name}, step {step}"))
    if any(not math.isnan(cell.limit) for cell in last):
        below = sum(cell.state == "measured" and cell.margin < 0 for cell in last)
        figures.append(Tile("below the gate at the last check", str(below), f"of {len(last)} modules"))
    return figures


def _direction(signed: Sequence[float]) -> list[Tile]:
    """Which way the updates point along the safety subspace, where the journal says so."""
    if not signed:
        return []
    against = sum(z < 0 for z in signed)
    said = f"{against} of {len(signed)} modules point against the alignment"
    return [Tile("mean signed z at the last check", f"{sum(signed) / len(signed):+z.1f}", said)]


def _probe_tiles(probes: Sequence[Probe]) -> Iterator[Tile]:
    """Harm, over-refusal and task together, as last asked; never one of them alone."""
    if not probes:
        return
    for m in probes[-1].measures:
        if m.measure != LOSS:
            yield Tile(f"{words(m.measure)} at the last probe", _figure(m), _about(m))


def _figure(m: Measured) -> str:
    if math.isnan(m.value):
        return "not known"
    return amount(m.value, SHARE) if m.unit == SHARE else number(m.value)


def _about(m: Measured) -> str:
    """The unit of a figure, its interval and its n."""
    ends = f"{m.interval} %" if m.interval and m.unit == SHARE else m.interval
    unit = "" if m.unit == SHARE else m.unit
    return ", ".join(filter(None, (unit, ends, f"n = {m.n}" if m.n else "")))


def words(measure: str) -> str:
    """Return a measure's name as words: `advbench_refused` is `advbench refused`."""
    return measure.replace("_", " ")


def module_rows(history: History) -> list[ModuleRow]:
    """Return a row for every module, panel by panel, layer by layer."""
    by_module = [_changes_by_module(changes) for changes in history.by_correction.values()]
    return [
        _module_row(history, name, part.title, label, by_module)
        for part in panels(history.modules)
        for name, label in zip(part.modules, part.labels, strict=True)
    ]


def _changes_by_module(changes: Mapping[tuple[str, int], bool]) -> dict[str, list[bool]]:
    """Module -> whether each of its changes was taken back."""
    modules: dict[str, list[bool]] = {}
    for (name, _), undone in changes.items():
        modules.setdefault(name, []).append(undone)
    return modules


def _module_row(
    history: History, name: str, kind: str, label: str, by_module: Sequence[Mapping[str, list[bool]]]
) -> ModuleRow:
    cells = history.by_module[name]
    known = {step: cell for step, cell in cells.items() if cell.state == "measured"}
    steps, nothing = list(known), Cell(math.nan, math.nan, "absent")
    last = cells[max(cells)] if cells else nothing
    lowest = min(known, key=lambda step: known[step].cosine, default=None)
    left = history.task_weights.get(name, {})
    return ModuleRow(
        name,
        kind,
        label,
        first=known[steps[0]].cosine if steps else math.nan,
        last=last.cosine if last.state == "measured" else math.nan,
        null=last.null_cosine,
        margin=last.margin if last.state == "measured" and not math.isnan(last.limit) else math.nan,
        lowest=known[lowest].cosine if lowest is not None else math.nan,
        lowest_at=lowest,
        changes=tuple((len(backs := changes.get(name, [])), sum(backs)) for changes in by_module),
        left=left[max(left)] if left else 1.0,
        norm=last.update_norm,
        moved=last.moved,
        state=last.state,
        reason=last.reason,
    )


def measure_names(probes: Iterable[Probe]) -> dict[str, str]:
    """Return measure -> kind, for every measure of any probe, in the order of first appearance."""
    return {m.measure: m.kind for probe in probes for m in probe.measures}


def _probe_row(probe: Probe, columns: Mapping[str, str]) -> dict[str, Any]:
    by_name = {m.measure: m for m in probe.measures}
    texts = [by_name[name].text if name in by_name else NOTHING for name in columns]
    tokens = NOTHING if math.isnan(probe.mean_tokens) else f"{probe.mean_tokens:.1f}"
    return {
        "step": probe.step,
        "when": probe.when,
        "texts": texts,
        "tokens": tokens,
        "seconds": seconds_text(probe.seconds),
        "incoherent": sum(m.incoherent for m in probe.measures),
        "unjudged": sum(m.unjudged for m in probe.measures),
    }


def share_text(history: History) -> str:
    """Return the callback's share of the training, as the journal's last entry has it; empty where there is none."""
    spent, all_of_it = history.end.get("seconds"), history.end.get("training_seconds")
    return (
        f"{spent / all_of_it:.2%} of {seconds_text(all_of_it)} of training" if spent is not None and all_of_it else ""
    )


def costs(history: History) -> list[tuple[str, str]]:
    """Return what the run's checks, merges, other changes and probes took, and which share of the training that was."""
    probe_seconds = sum(probe.seconds for probe in history.probes)
    lines = []
    if history.steps:
        lines.append(("checks", f"{seconds_text(history.check_seconds)} for {counted(history.checks, 'step')}"))
        merges = counted(history.by_correction[MERGE], "module merge")
        lines.append(("merges", f"{seconds_text(history.merge_seconds)} for {merges}"))
    for name, seconds in history.change_seconds.items():
        changes = counted(history.by_correction.get(name, ()), "module change")
        lines.append((f"changes by {name}", f"{seconds_text(seconds)} for {changes}"))
    lines += [(f"{name} before the first step", seconds_text(seconds)) for name, seconds in history.prepared.items()]
    for course in courses(history):
        lines.append(
            (f"passes of {course.name}", f"{seconds_text(course.seconds)} for {several(course.steps, 'step')}")
        )
    if history.probes:
        lines.append(
            ("probes, beside the training", f"{seconds_text(probe_seconds)} for {counted(history.probes, 'probe')}")
        )
    if share_text(history):
        # More than its parts: the trackers, the state files and the digests of the weights take their time too.
        lines.append(("all but the probes", f"{seconds_text(history.end['seconds'])}, {share_text(history)}"))
    return lines


def happenings(history: History) -> list[tuple[int | None, str, str]]:
    """Return (step, what, in words) of merges, other changes (by the correction's name), rules and faults, by step."""
    events: list[tuple[int | None, str, str]] = []
    for correction, changes in reversed(history.by_correction.items()):
        modules: dict[int, list[str]] = {}
        for name, step in changes:
            modules.setdefault(step, []).append(name)
        events += [(step, correction, f"{counted(names, 'module')}: {_some(names)}") for step, names in modules.items()]
    events += [(e.step, e.kind, f"{e.reason}{_touched(e.modules)}") for e in history.events]
    events += [(int(s["step"]), "resume", "the run went on from a checkpoint") for s in history.starts[1:]]
    events += [(None, "fault", text) for text in history.faults]
    return sorted(events, key=lambda happening: math.inf if happening[0] is None else happening[0])


def _touched(modules: Sequence[str]) -> str:
    return f" ({counted(modules, 'module')}: {_some(modules)})" if modules else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def sources(history: History) -> dict[str, list[tuple[str, str]]]:
    """Return heading -> (name, value) of what the journal's last start says of the run; nothing where it has none."""
    start = history.starts[-1] if history.starts else {}
    in_parts = {"kind", "version", "config", "versions", "subspace", "placement", "time"}
    run = {key: value for key, value in start.items() if key not in in_parts}
    probe_settings = next((probe.settings for probe in reversed(history.probes) if probe.settings), None)
    parts = {
        "settings": start.get("config"),
        "probe": probe_settings,
        "subspace": start.get("subspace"),
        "placement": start.get("placement"),
        "versions": start.get("versions"),
        "run": {"started": start.get("time"), **run} if start else None,
    }
    facts = {heading: list(_flat(part)) for heading, part in parts.items() if isinstance(part, Mapping)}
    return {heading: pairs for heading, pairs in facts.items() if pairs}


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            for one in value:
                yield from _flat(one, f"{before}{key}.")
        elif value is not None:
            yield f"{before}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)
