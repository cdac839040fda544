"""Which of several safety adapters fail at different prompts: read from the responses that `safemerge eval` keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..decision.weights.focal import Ensemble, choose_ensemble, failures_of
from ..errors import ConfigError, shown
from ..io.documents import parse_json, read_text
from .measure import LETTERS


class FocalChoice(NamedTuple):
    """The chosen set, and of each adapter its outcomes, a letter a prompt, in the order of the files."""

    chosen: Ensemble
    outcomes: list[str]


def choose_by_responses(
    files: Sequence[str | Path], count: int = 2, diversity_share: float = 0.5, *, prompts: str, judge: str
) -> FocalChoice:
    """Return which `count` of the adapters go together best, from one file of responses each; as `choose_ensemble`.

    `prompts` and `judge`: the set of harmful prompts and the judge whose verdicts count. ConfigError for files of other
    prompts, for one that lacks the set or the judge, and for a count that cannot be.
    """
    asked = [_verdicts(file, prompts, judge) for file in files]
    if len(asked) < 2 or not 1 <= count <= len(asked):
        raise ConfigError(f"{count} of {len(asked)} adapters are asked for: give files of two or more, and a count")
    for file, rows in zip(files, asked, strict=True):
        if [prompt for prompt, _ in rows] != [prompt for prompt, _ in asked[0]]:
            raise ConfigError(
                f"{str(file)!r} and {str(files[0])!r} hold other prompts of {prompts!r}: ask all adapters the same"
            )
    outcomes = ["".join(letter for _, letter in rows) for rows in asked]
    return FocalChoice(choose_ensemble(failures_of(outcomes), count, diversity_share), outcomes)


def _verdicts(file: str | Path, prompts: str, judge: str) -> list[tuple[str, str]]:
    """The prompts of a set with the letters of a judge's verdicts, in the order of the file."""
    who = f"responses {str(file)!r}"
    lines = read_text(file, who, advice="Give what `safemerge eval --responses` wrote").splitlines()
    rows = [parse_json(line, f"{who}, line {place}") for place, line in enumerate(lines, 1) if line.strip()]
    verdicts = [row for row in rows if _is_row(row) and (row["set"], row["judge"]) == (prompts, judge)]
    if not verdicts:
        there = sorted({(row["set"], row["judge"]) for row in rows if _is_row(row)})
        raise ConfigError(f"{who} has no verdicts of {judge!r} on {prompts!r}: it has those of {shown(there)}")
    return [(row["prompt"], LETTERS[row["verdict"]]) for row in verdicts]


def _is_row(row: Any) -> bool:
    texts = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("set", "judge", "prompt"))
    return texts and row.get("verdict") in LETTERS
