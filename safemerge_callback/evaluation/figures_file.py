"""What an evaluation leaves in writing, and who reads it: figures, what was asked, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

from ..errors import ConfigError, shown
from ..io.documents import read_json
from ..io.numbers import is_number, is_whole
from .digests import template_digest, texts_digest
from .judges import Judge, decides, name_of
from .measure import FIGURE_COLUMNS, Kind, Share, as_share, columns, share_of
from .prompts import PromptSet
from .units import unit_of

# Of how a model was asked, what changes its answers.
MANNER = ("template", "chat_template_kwargs", "system", "max_new_tokens")


class Evaluation(NamedTuple):
    """Figures of a model under a `name`, and how it was asked, as far as that is known.

    `sources`: prompt set -> where its prompts come from. `manner`: those of `MANNER` that are known.
    """

    name: str
    figures: Sequence[Share]
    sources: Mapping[str, str] = MappingProxyType({})
    manner: Mapping[str, Any] = MappingProxyType({})


def figure_rows(figures: Sequence[Share]) -> list[dict[str, Any]]:
    """Return figures as JSON has them."""
    return [columns(figure, FIGURE_COLUMNS) for figure in figures]


def question_keys(tokenizer: Any, sets: Sequence[PromptSet], judges: Sequence[Judge]) -> dict[str, Any]:
    """Return what was asked and who judged, as JSON has it: no prompt, but the digests of all."""
    return {
        "sets": [{**asdict(one), "prompts": len(one), "digest": texts_digest(one.prompts)} for one in sets],
        "judges": [{"name": name_of(one), "decides": decides(one)} for one in judges],
        "template": template_digest(tokenizer),
    }


def read_evaluation(path: Any) -> Evaluation:
    """Return what `safemerge eval -o`, `gate --json` or its evidence has; ConfigError for what is no such file."""
    who = f"figures {shown(path)}"
    document = read_json(path, who)
    rows = document.get("figures") if isinstance(document, Mapping) else None
    if not isinstance(rows, list):
        raise ConfigError(f"{who} are no file of `safemerge eval -o` or `gate --json`: it has no list of figures")
    figures = figures_of(rows, who)
    settings = document.get("settings")
    known = {**(settings if isinstance(settings, Mapping) else {}), "template": document.get("template")}
    manner = {key: known[key] for key in MANNER if known.get(key) is not None}
    return Evaluation(str(path), figures, _sources(document.get("sets")), manner)


def figures_of(rows: Sequence[Any], who: str) -> list[Share]:
    """Return figures from what JSON has of them; ConfigError, which begins with `who`, for a row that is none."""
    return [_figure(row, f"{who}: figure {place}") for place, row in enumerate(rows, 1)]


def is_counted(share: Share) -> bool:
    """Whether its value and interval are those of its outcomes, but for rounding; True where it has none."""
    if not share["outcomes"]:
        return True
    again = share_of(share["measure"], share["outcomes"], share["kind"])
    ends = ((share[key], again[key]) for key in ("value", "low", "high"))
    return all(
        one == other or (one is not None and other is not None and abs(one - other) < 1e-9) for one, other in ends
    )


def read_figures(path: Any) -> list[Share]:
    """Return the figures of `read_evaluation` alone."""
    return list(read_evaluation(path).figures)


def _sources(sets: Any) -> dict[str, str]:
    rows = [one for one in sets if isinstance(one, Mapping)] if isinstance(sets, list) else []
    return {str(one["name"]): str(one["source"]) for one in rows if "name" in one and "source" in one}


def _figure(row: Any, who: str) -> Share:
    fits = isinstance(row, Mapping) and isinstance(row.get("measure"), str) and row.get("kind") in get_args(Kind)
    fits = fits and all(row.get(key) is None or is_number(row[key]) for key in ("value", "low", "high"))
    fits = fits and (row.get("n") is None or is_whole(row["n"], 0)) and is_whole(row.get("incoherent", 0), 0)
    fits = fits and is_whole(row.get("unjudged", 0), 0) and _letters_fit(row)
    if not fits or not _in_order(row):
        raise ConfigError(
            f"{who} is {shown(row)}: it needs measure, kind, n, value, low and high as `eval` writes them"
        )
    name, kind = row["measure"], row["kind"]
    known: dict[str, Any] = {key: row.get(key, 0) for key in ("incoherent", "unjudged")}
    known |= {key: row[key] for key in ("judge", "outcomes", "prompts") if isinstance(row.get(key), str)}
    known |= {key: row.get(key) for key in ("value", "n", "low", "high")}
    return as_share(name, kind, unit=unit_of(name, kind, row.get("unit")), **known)


def _letters_fit(row: Mapping[str, Any]) -> bool:
    """Whether the outcomes, where there are any, are as many as the n, and as many of them hits as the value says."""
    outcomes = row.get("outcomes") or ""
    if not isinstance(outcomes, str) or set(outcomes) - set("10iu"):
        return False
    n = len(outcomes) - outcomes.count("u")
    return not outcomes or (row.get("n") == n and abs((row.get("value") or 0.0) * n - outcomes.count("1")) < 1e-6)


def _in_order(row: Mapping[str, Any]) -> bool:
    """Whether the value lies in its interval, but for rounding, as far as they are known."""
    ends = [row[key] for key in ("low", "value", "high") if row.get(key) is not None]
    return all(one <= other + 1e-6 for one, other in pairwise(ends))
