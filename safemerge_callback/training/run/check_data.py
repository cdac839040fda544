"""The rows of a run that its checks ask the live model about: opened before the first step, kept, and handed out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...adapters.host import to_host
from ...corrections.check_rows import RowSettings, safety_batch
from ...corrections.protocol import RunPoint
from ...decision import Readings
from ...errors import AdapterError
from ...live.engine import engine_of
from ...live.faults import Fault
from ...live.ranks import all_or_none, everyones, from_first, many, rank, world_size
from ...ops import Grams
from ...signals.adapter_off import adapter_off
from ...signals.check_data import GRAMS, SAFETY_BATCH, TASK_BATCH, CheckData
from ...signals.module_signals import ModuleSignal, check_engine, data_among, signals_among
from ...signals.row_inputs import row_inputs
from ...signals.rows import RowTokens
from ...signals.task_inputs import InputState, TaskInputs, joined
from ...signals.task_rows import TaskRows
from .task_state import read_inputs, read_rows, write_inputs, write_rows


@dataclass
class RunData:
    """The rows of one run and the signals that are taken of them; a `Kept`. Made by `open_data`.

    `task`: the rows that this process was trained on last, `inputs`: what each module was given then; `safety_inputs`:
    module -> factor of what it is given on harmful rows in the aligned model. `ranks` and `states`: what all processes
    had when they last told each other, after step `exchanged`.
    """

    model: nn.Module | None = None
    signals: Sequence[ModuleSignal] = ()
    safety: tuple[RowTokens, ...] = ()
    task: TaskRows | None = None
    inputs: TaskInputs | None = None
    safety_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    knobs: Mapping[str, Any] = field(default_factory=dict)
    adapter_name: str | None = None
    ranks: list[tuple[RowTokens, ...]] = field(default_factory=list)
    states: list[InputState] = field(default_factory=list)
    step: int = 0
    exchanged: int = -1
    name: str = "task rows"
    noun: str = "last rows of the task"

    @property
    def follows(self) -> bool:
        """Whether anything of the task's batches is kept."""
        return self.task is not None or self.inputs is not None

    def at(self, point: RunPoint, *, rehearsal: bool = False) -> CheckData | None:
        """Return what may be asked at a check, None where nothing is. Collective: ranks exchange what they kept.

        Before the first step there is nothing of the task yet: safety rows stand for it in the rehearsal. AdapterError
        where a run has none later.
        """
        if self.model is None or not (self.signals or self.safety or self.follows):
            return None
        task, grams = self._task_rows(rehearsal=rehearsal), self._grams(rehearsal=rehearsal)
        about = (point.factors(), point.safety, self.knobs, grams, self.adapter_name)
        return CheckData(self.model, self.safety, task, *about)

    def _task_rows(self, *, rehearsal: bool) -> tuple[RowTokens, ...]:
        if self.task is None:
            return ()
        rows = tuple(row for one in everyones(all_or_none(self.task.rows)) for row in one)
        if not rows and not rehearsal:
            raise AdapterError(
                "no batch of this training was seen as token ids that its loss counts (input_ids and labels), so there "
                "are no task rows: choose a gate, method or weights rule that needs none"
            )
        return rows or self.safety

    def _grams(self, *, rehearsal: bool) -> dict[str, Grams] | None:
        if self.inputs is None:
            return None
        mine = self.inputs.inputs()
        if many():
            mine = mine._replace(rows=dict(zip(mine.rows, to_host([*mine.rows.values()]), strict=True)))
        task = joined(everyones(mine)) or (dict(self.safety_inputs) if rehearsal else {})
        if lacking := [name for name in self.safety_inputs if name not in task]:
            raise AdapterError(
                f"module {lacking[0]!r} was given no tokens in the last batches of this training, so there is no Gram "
                "of its inputs: choose a method that needs none"
            )
        return {name: Grams(task[name], factor) for name, factor in self.safety_inputs.items()}

    def exchange(self) -> None:
        """Let the first rank, which writes checkpoints, know what all ranks have kept. Collective."""
        self.exchanged = self.step
        if self.task is not None:
            self.ranks = everyones(all_or_none(self.task.rows))
        if self.inputs is not None:
            self.states = everyones(self.inputs.state)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Within, what goes through the model is no batch of the task."""
        with ExitStack() as stack:
            for one in (self.task, self.inputs):
                if one is not None:
                    stack.enter_context(one.unseen())
            yield

    def after_step(self, at: RunPoint) -> None:
        """Batches are looked at as they pass."""
        self.step = at.step

    def save(self, folder: Path, save: str) -> None:
        """Write what every rank has kept; nothing after a step without an exchange. Raises OSError."""
        current = self.exchanged == self.step
        if self.task is not None:
            write_rows(folder, save, (self.ranks if current else []) if many() else [self.task.rows()])
        if self.inputs is not None:
            write_inputs(folder, save, (self.states if current else []) if many() else [self.inputs.state])

    def load(self, folders: Sequence[Path], save: str | None) -> bool:
        """Go on from there; as `Kept.load`."""
        stored = from_first(all_or_none(lambda: self._read(folders, save) if rank() == 0 else ([], [])))
        rows, states = (_share(ranks, what) for ranks, what in zip(stored, _KEPT, strict=True))
        if self.task is not None and rows is not None:
            self.task.earlier = tuple(rows)
        if self.inputs is not None and states is not None and self.model is not None:
            self.inputs.restore(states, next(self.model.parameters()).device)
        return (self.task is None or rows is not None) and (self.inputs is None or states is not None)

    def _read(self, folders: Sequence[Path], save: str | None) -> tuple[Any, Any]:
        rows = None if self.task is None else read_rows(folders, save)
        return rows, None if self.inputs is None else read_inputs(folders, save)

    def rewind(self, folders: Sequence[Path], save: str | None) -> None:
        """The weights are an earlier step's again; what was trained on last is still that."""


_KEPT = ("task rows", "inputs of the task's batches")


def _share(ranks: Sequence[Any] | None, what: str) -> Any:
    """What this rank goes on with; None where there is nothing, or of another number of processes."""
    if ranks and len(ranks) == world_size():
        return ranks[rank()]
    if ranks:
        warnings.warn(
            f"safemerge: the checkpoint holds the {what} of {len(ranks)} processes and there are {world_size()} now: "
            "they are gathered anew",
            stacklevel=2,
        )
    return None


def open_data(
    needs: Mapping[str, str],
    settings: RowSettings,
    point: RunPoint,
    model: nn.Module,
    tokenizer: Any,
    corrections: Sequence[object] = (),
    adapter_name: str | None = None,
    knobs: Mapping[str, Any] | None = None,
    *,
    bars: bool = False,
) -> tuple[RunData, str | None]:
    """Return the rows that these needs come to, and a line on the safety rows where there are some. Collective.

    `corrections` are prepared by now. Raises ConfigError, on all ranks, for an engine on which a signal cannot be
    taken, and as `safety_batch`.
    """
    check_engine(needs, engine_of(model, point.optimizer))
    wanted = data_among(needs)
    data = RunData(model, signals_among(needs), knobs=knobs or {}, adapter_name=adapter_name)
    line = None
    if SAFETY_BATCH in wanted:
        data.safety, words = safety_batch(model, tokenizer, settings, corrections, wanted[SAFETY_BATCH], bars=bars)
        line = f"{wanted[SAFETY_BATCH]} asks about safety rows: {words}"
    if TASK_BATCH in wanted:
        data.task = TaskRows(-(-settings.num_task_rows // world_size()))
        data.task.follow(model)
    if GRAMS in wanted:
        rows = [row for row in data.safety if row.kind == "harm"]
        with adapter_off(model):
            data.safety_inputs = row_inputs(model, _few(rows, settings.gram_rows), adapter_name)
        data.inputs = TaskInputs(-(-settings.gram_rows // world_size()))
        data.inputs.follow(model, adapter_name)
    return data, line


def _few(rows: Sequence[RowTokens], count: int) -> list[RowTokens]:
    """As many of the rows, from the first on, as have `count` tokens of responses, one at least."""
    few, tokens = list(rows[:1]), len(rows[0].response)
    for row in rows[1:]:
        tokens += len(row.response)
        if tokens > count:
            break
        few.append(row)
    return few


class Answer(NamedTuple):
    """What a check asked the live model about, and what it said, as signal -> module -> number."""

    data: CheckData | None
    signals: Mapping[str, Mapping[str, float]]


def ask(run: RunData, point: RunPoint, *, rehearsal: bool = False) -> Answer:
    """Ask the live model what a check needs; every rank alike, and rank 0's numbers count. Collective; raises."""
    data = run.at(point, rehearsal=rehearsal)
    if data is None:
        return Answer(None, {})
    return Answer(data, from_first({signal.name: dict(signal.function(data)) for signal in run.signals}))


def with_signals(readings: Readings | Fault, answer: Answer | Fault) -> Readings | Fault:
    """Return the readings with what the live model said of their modules, or the fault of any rank. Collective."""
    faults = [one for one in everyones(answer if isinstance(answer, Fault) else None) if one is not None]
    if isinstance(readings, Fault):
        return readings
    return faults[0] if faults or isinstance(answer, Fault) else readings.with_signals(answer.signals)
