"""The trace of a search: a line an evaluation, written as it is made, so that a killed search goes on from it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..io.documents import read_text
from ..signals.merge_problem import Evaluation
from .output import TRACE

_FORMAT = 1


def trace_beside(target: Path) -> Path:
    """Return where the trace of a search lies until its output folder does."""
    return target.with_name(f"{target.name}.{TRACE}")


class Trace:
    """A file of evaluations: a header of what is searched, then a line each; numbers that are none are null."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """Open it, and read what a search of the same things left there; ConfigError for one of others."""
        self.path, self._about = path, {"search": _FORMAT, **about}
        lines = _lines(path) if path.exists() else []
        if lines and lines[0] != self._about:
            changed = sorted(key for key in {*lines[0], *self._about} if lines[0].get(key) != self._about.get(key))
            raise ConfigError(
                f"the trace {str(path)!r} is of another search, which differs in {changed}: remove it, or give another "
                "output"
            )
        self.known: list[Evaluation] = [_evaluation(line) for line in lines[1:]]
        text = [self._about, *(_line(one) for one in self.known)]
        path.parent.mkdir(parents=True, exist_ok=True)
        # What was cut short goes, so that the next line begins where a line begins.
        path.write_text("".join(f"{json.dumps(line)}\n" for line in text), encoding="utf-8")

    def add(self, evaluation: Evaluation) -> None:
        """Write an evaluation; it is on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(_line(evaluation))}\n")
            file.flush()
            os.fsync(file.fileno())


def read_trace(path: Path) -> tuple[dict[str, Any], list[Evaluation]]:
    """Return the header and the evaluations of a trace; ConfigError for a file that is none."""
    lines = _lines(path)
    if not lines:
        raise ConfigError(f"{str(path)!r} holds no trace of a search")
    return lines[0], [_evaluation(line) for line in lines[1:]]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines; the last is left out where a kill cut it short."""
    parsed: list[dict[str, Any]] = []
    for line in read_text(path, f"trace {str(path)!r}", advice="Give the trace of a search").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not isinstance(value, dict):
            break
        parsed.append(value)
    if parsed and parsed[0].get("search") != _FORMAT:
        raise ConfigError(f"{str(path)!r} is no trace of a search: give another output, or remove it")
    return parsed


def _line(one: Evaluation) -> dict[str, Any]:
    numbers = {name: _number(getattr(one, name)) for name in ("value", "task", "safety")}
    slopes = None if one.slopes is None else [_number(slope) for slope in one.slopes]
    return {
        "stage": one.stage,
        "point": list(one.point),
        "batch": one.batch,
        **numbers,
        "slopes": slopes,
        "seconds": round(one.seconds, 4),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _evaluation(line: Mapping[str, Any]) -> Evaluation:
    try:
        slopes: Sequence[Any] | None = line["slopes"]
        task, safety = (math.nan if line[name] is None else float(line[name]) for name in ("task", "safety"))
        return Evaluation(
            line["stage"],
            tuple(map(float, line["point"])),
            line["batch"],
            math.inf if line["value"] is None else float(line["value"]),
            task,
            safety,
            None if slopes is None else tuple(math.nan if slope is None else float(slope) for slope in slopes),
            float(line["seconds"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"a line of the trace is no evaluation ({error}): remove the trace") from error
