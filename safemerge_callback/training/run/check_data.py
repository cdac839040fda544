"""The rows of a run that its checks ask the live model about: opened before the first step, kept, and handed out."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ...corrections.check_rows import RowSettings, safety_batch
from ...corrections.protocol import RunPoint
from ...decision import Readings
from ...errors import AdapterError
from ...io.whole_file import whole_file
from ...live.engine import engine_of
from ...live.faults import Fault
from ...live.ranks import all_or_none, everyones, from_first, rank, world_size
from ...signals.check_data import SAFETY_BATCH, TASK_BATCH, CheckData
from ...signals.module_signals import ModuleSignal, check_engine, data_among, signals_among
from ...signals.rows import RowTokens
from ...signals.task_rows import TaskRows

STATE_FILE = "safemerge_task_rows.json"


@dataclass
class RunData:
    """The rows of one run and the signals that are taken of them; a `Kept`. Made by `open_data`.

    `ranks`: what each process had last exchanged with the others, and at which step.
    """

    model: nn.Module | None = None
    signals: Sequence[ModuleSignal] = ()
    safety: tuple[RowTokens, ...] = ()
    task: TaskRows | None = None
    knobs: Mapping[str, Any] = field(default_factory=dict)
    adapter_name: str | None = None
    ranks: tuple[int, list[tuple[RowTokens, ...]]] = (-1, [])
    name: str = "task rows"
    noun: str = "last rows of the task"

    @property
    def needed(self) -> bool:
        """Whether anything of a check asks the live model."""
        return bool(self.signals or self.safety or self.task)

    def at(self, point: RunPoint, *, rehearsal: bool = False) -> CheckData | None:
        """Return what may be asked at a check, None where nothing is. Collective: ranks exchange their task rows.

        Before the first step there are none yet: safety rows stand for them in the rehearsal. AdapterError where a run
        has none later.
        """
        if self.model is None or not self.needed:
            return None
        task = self._task_rows(point.step, rehearsal=rehearsal)
        factors = point.factors()
        return CheckData(self.model, self.safety, task, factors, point.safety, self.knobs, self.adapter_name)

    def _task_rows(self, step: int, *, rehearsal: bool) -> tuple[RowTokens, ...]:
        if self.task is None:
            return ()
        self.exchange(step)
        rows = tuple(row for one in self.ranks[1] for row in one)
        if not rows and rehearsal:
            return self.safety
        if not rows:
            raise AdapterError(
                "no batch of this training was seen as token ids that its loss counts (input_ids and labels), so there "
                "are no task rows: choose a gate, method or weights rule that needs none"
            )
        return rows

    def exchange(self, step: int) -> None:
        """Let every rank know the task rows of all, as they are after this step. Collective."""
        if self.task is not None:
            self.ranks = step, everyones(all_or_none(self.task.rows))

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Within, what goes through the model is no batch of the task."""
        if self.task is None:
            yield
            return
        with self.task.unseen():
            yield

    def after_step(self, at: RunPoint) -> None:
        """Nothing follows a step: rows are kept as they pass."""

    def save(self, folder: Path, save: str) -> None:
        """Write the task rows of every rank, as token ids. Raises OSError."""
        if self.task is None:
            return
        ranks = [self.task.rows()] if world_size() == 1 else self.ranks[1]
        state = {"save": save, "ranks": [[[row.prompt, row.response] for row in one] for one in ranks]}
        with whole_file(folder / STATE_FILE) as place:
            place.write_text(json.dumps(state) + "\n", encoding="utf-8")

    def load(self, folders: Sequence[Path], save: str | None) -> bool:
        """Go on from there; as `Kept.load`."""
        if self.task is None:
            return True
        ranks = from_first(all_or_none(lambda: _stored(folders, save) if rank() == 0 else None))
        if ranks is None:
            return False
        if len(ranks) != world_size():
            warnings.warn(
                f"safemerge: the checkpoint holds the task rows of {len(ranks)} processes and there are "
                f"{world_size()} now: they are shared out anew",
                stacklevel=2,
            )
            rows = [row for one in ranks for row in one]
            ranks = [rows[place :: world_size()] for place in range(world_size())]
        self.task.earlier = tuple(ranks[rank()])
        return True

    def rewind(self, folders: Sequence[Path], save: str | None) -> None:
        """The weights are an earlier step's again; the rows are still those that were trained on last."""


def open_data(
    needs: Mapping[str, str],
    settings: RowSettings,
    point: RunPoint,
    model: nn.Module,
    tokenizer: Any,
    corrections: Sequence[object],
    *,
    bars: bool = False,
    **about: Any,
) -> tuple[RunData, str | None]:
    """Return the rows that these needs come to, and a line on the safety rows where there are some. Collective.

    `corrections` are prepared by now. `about`: fields of `RunData` beside. Raises ConfigError, on all ranks, for an
    engine on which a signal cannot be taken, and as `safety_batch`.
    """
    check_engine(needs, engine_of(model, point.optimizer))
    wanted = data_among(needs)
    rows: tuple[RowTokens, ...] = ()
    line = None
    if SAFETY_BATCH in wanted:
        rows, words = safety_batch(model, tokenizer, settings, corrections, wanted[SAFETY_BATCH], bars=bars)
        line = f"{wanted[SAFETY_BATCH]} asks about safety rows: {words}"
    task = None
    if TASK_BATCH in wanted:
        task = TaskRows(-(-settings.num_task_rows // world_size()))
        task.follow(model)
    return RunData(model, signals_among(needs), rows, task, **about), line


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


def _stored(folders: Sequence[Path], save: str | None) -> list[list[RowTokens]] | None:
    """What `save` wrote into the first of these folders that has it; AdapterError where it cannot be read."""
    for path in (folder / STATE_FILE for folder in folders):
        if not path.is_file():
            continue
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if save is None or state["save"] == save:
                return [[_row(*pair) for pair in one] for one in state["ranks"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterError(
                f"{str(path)!r} cannot be read ({error}), so it is not known which rows were trained on last: take "
                "another checkpoint"
            ) from error
    return None


def _row(prompt: Any, response: Any) -> RowTokens:
    ids = [tuple(int(token) for token in part) for part in (prompt, response)]
    if not all(ids):
        raise ValueError("a row lacks tokens")
    return RowTokens(ids[0], ids[1], "task")
