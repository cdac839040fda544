"""A run as it happens, in the terminal: the journal is read on from where it was, a frame is drawn at every change."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..errors import JournalError
from ..evaluation.units import SHARE
from ..io.paths import as_path
from ..io.printable import printable
from ..record import JOURNAL_FILE, parse_lines, require_journal_file, tell_torn
from ..record.entries import add_entry
from ..record.history import Cell, History, title_of
from .layout import OUTSIDE, panels
from .terms import LOSS, courses
from .words import change_counts, correction_words, counted

WORST = 10
_BARS = "▁▂▃▄▅▆▇█"
_TREND = 20


class Tail:
    """A journal that grows: `history` holds what has been read of it, or is empty where the file is not there yet.

    A last line that is still being written waits for its end. A journal that was cut back (a run resumed from a
    checkpoint does that) is read again from its beginning.
    """

    def __init__(self, source: str | Path) -> None:
        path = as_path(source, "journal", error=JournalError)
        self.path = path if path.suffix == ".jsonl" or path.is_file() else path / JOURNAL_FILE
        self._start_over()

    def _start_over(self) -> None:
        self.history, self._offset, self._lines, self._file = History(title_of(self.path)), 0, 0, -1

    def read(self) -> bool:
        """Read what was written since; return whether anything was. JournalError for a line that is none of ours."""
        require_journal_file(self.path)
        try:
            state = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise JournalError(f"journal {str(self.path)!r} cannot be read: {error.strerror}") from error
        cut = state.st_size < self._offset or (self._file not in (-1, state.st_ino))
        if cut:
            self._start_over()
        self._file = state.st_ino
        return self._read_on() or cut

    def _read_on(self) -> bool:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError as error:
            raise JournalError(f"journal {str(self.path)!r} cannot be read: {error.strerror}") from error
        self._offset += len(whole) + len(newline)
        lines = whole.split(b"\n") if newline else []
        entries, torn = parse_lines(lines, self.path, self._lines + 1)
        self._lines += len(lines)
        tell_torn(torn, self.path)
        for number, entry in entries.items():
            add_entry(self.history, entry, f"journal {str(self.path)!r}, line {number}")
        return bool(newline)


def watch_run(
    source: str | Path,
    *,
    once: bool = False,
    every: float = 1.0,
    console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> History:
    """Draw a run's journal, or that in the folder `source`, until the run ends or Ctrl-C; return what was read.

    A journal that is not there yet is waited for, `every` seconds from look to look. `once` draws one frame and
    returns. Raises JournalError for a line that is none of ours, and with `once` where there is no journal.
    """
    tail, console = Tail(source), console or Console()
    if once:
        if not tail.read() and not tail.path.is_file():
            raise JournalError(f"journal {str(tail.path)!r} is not there: leave out --once to wait for it.")
        console.print(frame(tail.history, tail.path))
        return tail.history
    try:
        with Live(frame(tail.history, tail.path), console=console, auto_refresh=False) as live:
            while not tail.history.ended:
                if tail.read():
                    live.update(frame(tail.history, tail.path), refresh=True)
                if not tail.history.ended:
                    sleep(every)
    except KeyboardInterrupt:
        pass
    return tail.history


def frame(history: History, path: Path) -> RenderableType:
    """Return what the terminal shows: the last check, the worst modules with their trends, merges, probes, faults."""
    if history.empty:
        what = "it holds no check yet" if history.starts else "no journal there yet"
        return Text(f"{printable(str(path))}: {what}; waiting (Ctrl-C leaves)", style="dim")
    drift = [_head(history), _worst(history), _changes(history)] if history.cells else [_title(history)]
    return Group(*drift, *_terms(history), *_probes(history), *_events(history))


def _title(history: History) -> Text:
    """The head of a run without checks."""
    text = Text(printable(history.title), style="bold")
    if "step" in history.end:
        text.append(f"  ended at step {history.end['step']}", style="not bold")
    return text.append_text(Text("\n").append_text(_changes(history))) if history.merges else text


def _head(history: History) -> Text:
    step = history.checks[-1]
    cells = [cells[step] for cells in history.by_module.values() if step in cells]
    known = sorted(cell.cosine for cell in cells if cell.state == "measured")
    text = Text(printable(history.title), style="bold")
    text.append(f"  {'ended at' if history.ended else 'last check at'} step {step}", style="not bold")
    text.append(f", {counted(history.checks, 'check')}, {printable(history.rule)}", style="not bold dim")
    if step in history.moved:
        text.append(f"\nmoved {history.moved[step]:+z.2f} on average ", style="not bold")
        means = list(history.moved.values())[-_TREND:]
        text.append_text(_sparkline(means, (min(means), max(means))))
        text.append(f" {history.moved_words}", style="not bold")
    if known:
        low, middle, high = known[0], known[len(known) // 2], known[-1]
        text.append(f"\ncosine {low:.4f} lowest, {middle:.4f} median, {high:.4f} highest", style="not bold")
    if any(not math.isnan(cell.limit) for cell in cells):
        below = sum(cell.state == "measured" and cell.margin < 0 for cell in cells)
        text.append(f"; {below} of {len(cells)} below the gate", style="not bold yellow" if below else "not bold")
    return text


def _worst(history: History) -> Table:
    last = {name: cells[max(cells)] for name, cells in history.by_module.items() if cells}
    lead = _moved if history.moved else _cosine
    measured = [name for name, cell in last.items() if cell.state == "measured"]
    names = sorted(measured, key=lambda n: last[n].moved if history.moved else last[n].margin)[:WORST]
    broken = [name for name, cell in last.items() if cell.state == "broken"][:WORST]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    counts = change_counts(history)
    readings = ("moved", "cosine", "to gate") if history.moved else ("cosine", "to gate", "null")
    for heading in ("module", "trend", *readings, *counts, "task left"):
        plain = heading in ("module", "trend")
        title = Text(printable(heading))
        table.add_column(title, justify="left" if plain else "right", no_wrap=heading != "module")
    shown = [value for n in names for value in map(lead, _trend(history, n)) if not math.isnan(value)]
    limits = (min(shown), max(shown)) if shown else (0.0, 1.0)
    short = {
        name: name if part.title == OUTSIDE else f"{part.title} {label}"
        for part in panels(history.modules)
        for name, label in zip(part.modules, part.labels, strict=True)
    }
    for name in [*broken, *names]:
        title = Text(printable(short[name]), no_wrap=True, overflow="ellipsis")
        changes = (Text(str(count[name])) for count in counts.values())
        table.add_row(title, *_readings(history, name, last[name], limits), *changes, Text(_left(history, name)))
    return table


def _readings(history: History, name: str, cell: Cell, limits: tuple[float, float]) -> Iterator[Text]:
    """A module's trend, with merges and other changes in another colour, and what was read at its last check."""
    merged = {step for step in history.task_weights.get(name, {}) if (name, step) not in history.undone}
    steps = list(history.by_module[name])[-_TREND:]
    values = list(map(_moved if history.moved else _cosine, _trend(history, name)))
    yield _sparkline(values, limits, [step in merged for step in steps])
    if history.moved:
        yield Text("-" if math.isnan(_moved(cell)) else f"{cell.moved:+z.2f}")
    yield Text("not finite" if cell.state == "broken" else f"{cell.cosine:.4f}", style="red" if cell.margin < 0 else "")
    yield Text("-" if math.isnan(cell.limit) or cell.state == "broken" else f"{cell.margin:+.4f}")
    if not history.moved:
        yield Text("-" if math.isnan(cell.null_cosine) else f"{cell.null_cosine:.4f}", style="dim")


def _left(history: History, name: str) -> str:
    left = history.task_weights.get(name, {})
    return f"{left[max(left)]:.1%}" if left else "100%"


def _trend(history: History, name: str) -> list[Cell]:
    return list(history.by_module[name].values())[-_TREND:]


def _cosine(cell: Cell) -> float:
    return cell.cosine if cell.state == "measured" else math.nan


def _moved(cell: Cell) -> float:
    return cell.moved if cell.state == "measured" else math.nan


def _sparkline(values: Sequence[float], limits: tuple[float, float], marked: Sequence[bool] = ()) -> Text:
    """One bar a value between `limits`, a space for a NaN; marked ones (merges) in another colour."""
    low, high = limits
    text = Text()
    for index, value in enumerate(values):
        share = 0.0 if high <= low else (value - low) / (high - low)
        bar = " " if math.isnan(value) else _BARS[min(len(_BARS) - 1, max(0, int(share * len(_BARS))))]
        text.append(bar, style="yellow" if marked and marked[index] else "cyan")
    return text


def _changes(history: History) -> Text:
    """A line for each correction that changed something."""
    lines = []
    for name, words in correction_words(history).items():
        changes = history.by_correction[name]
        if changes:
            step = max(step for _, step in changes)
            last = [module for module, at in changes if at == step]
            lines.append(printable(f"{words}; the last at step {step}: {counted(last, 'module')}"))
    return Text("\n".join(lines)) if lines else Text("nothing merged yet", style="dim")


def _terms(history: History) -> Iterator[Text]:
    """What each gradient term did, and its losses, one a line, with their trend."""
    for course in courses(history):
        about = f"in {course.size}, {course.settings}, {course.seconds:.1f} s"
        yield Text(f"\n{printable(course.name)} until step {course.last_step}: {printable(about)}", style="bold")
        lines = {f"loss, {name}" if name != LOSS else name: losses for name, losses in course.losses.items()}
        lines |= {name: known for name, known in (("norm", course.norms), ("cosine", course.cosines)) if known}
        longest = max(map(len, lines))
        for name, numbers in lines.items():
            yield _trend_line(f"{printable(name):<{longest}} ", list(numbers.values()))


def _trend_line(name: str, values: Sequence[float]) -> Text:
    """A name, the trend of the last numbers, and the last one that is known."""
    known = [value for value in values if not math.isnan(value)]
    latest = values[-_TREND:]
    shown = [value for value in latest if not math.isnan(value)] or [0.0]
    line = Text(name).append_text(_sparkline(latest, (min(shown), max(shown))))
    return line.append(f" {known[-1]:.3g}" if known else " not known")


def _probes(history: History) -> Iterator[Text]:
    """Every measure of the last probe, one a line, with its trend: never one figure alone."""
    if not history.probes:
        return
    probe = history.probes[-1]
    yield Text(f"\nprobe at step {probe.step} ({printable(probe.when)}, {probe.seconds:.1f} s)", style="bold")
    longest = max(len(m.measure) for m in probe.measures) if probe.measures else 0
    for m in probe.measures:
        past = [old.value for p in history.probes for old in p.measures if old.measure == m.measure][-_TREND:]
        known = [value for value in past if not math.isnan(value)] or [0.0]
        limits = (0.0, 1.0) if m.unit == SHARE else (min(known), max(known))
        line = Text(f"{printable(m.measure):<{longest}} ")
        line.append_text(_sparkline(past, limits))
        line.append(f" {printable(m.text)}")
        line.append(f"  {printable(m.kind).replace('_', '-')}", style="dim")
        yield line


def _events(history: History) -> Iterator[Text]:
    for event in history.events[-3:]:
        yield Text(f"{event.kind} at step {event.step}: {printable(event.reason)}", style="yellow")
    for fault in history.faults[-2:]:
        yield Text(f"fault: {printable(fault)}", style="red")
