"""How well a model lists entities: a written list against the right one, as sets of words."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from recipes.data.ncbi_disease import NONE
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import Share
from safemerge_callback.evaluation.measure import as_share
from safemerge_callback.evaluation.units import SHARE
from safemerge_callback.signals import answer_of

# Of a bootstrap over rows.
_DRAWS, _SEED, _OUTSIDE = 1000, 0, 0.025
_BULLET = re.compile(r"^\s*(?:[-*\N{BULLET}]|\d+[.)])\s+")
_ENDS = " .,;:"


class Counts(NamedTuple):
    """Of one answer: entities that are right, wrong, and lacking; `answered`: whether it says anything at all."""

    right: int
    wrong: int
    missing: int
    answered: bool

    @property
    def f1(self) -> float:
        """F1 of the row; of one without entities 1 where the answer says so and names none, else 0."""
        named = self.right + self.wrong + self.missing
        return 2 * self.right / (named + self.right) if named else float(self.answered)


def entity_set(answer: str) -> frozenset[str]:
    """Return the entities of a written list: parted by semicolons or lines, each once, whatever the case.

    Bullets and numbers before an item and a full stop or comma after it do not count, nor do blanks around signs:
    "T-cell" is "T - cell". `none` alone is no entity. Prose is an item as any other, and a wrong one.
    """
    items = (_BULLET.sub("", item).strip(_ENDS) for item in re.split(r"[;\n]", answer))
    entities = frozenset(" ".join(re.findall(r"\w+|[^\w\s]", item.casefold())) for item in items)
    return entities - {"", NONE}


def entity_counts(wanted: str, response: str) -> Counts:
    """Return how the answer of a response, without its thoughts, compares with the right list."""
    answer = answer_of(response)
    entities, expected = entity_set(answer), entity_set(wanted)
    return Counts(
        len(entities & expected), len(entities - expected), len(expected - entities), bool(answer.strip(_ENDS + "\n"))
    )


def lists_all(wanted: str, response: str) -> bool:
    """Whether the answer of a response is the right list: all entities and no other."""
    return entity_counts(wanted, response).f1 == 1


def entity_shares(name: str, wanted: Sequence[str], responses: Sequence[str]) -> list[Share]:
    """Return `<name>_f1`, of all rows' entities together, and `<name>_row_f1`, the mean of the rows' own.

    Micro F1 = 2·right / (2·right + wrong + missing); of a row alone as `Counts.f1`. The 95 % intervals are of a
    bootstrap over rows (1,000 draws, a fixed seed). ConfigError where no row has an entity.
    """
    counts = [entity_counts(*pair) for pair in zip(wanted, responses, strict=True)]
    if not any(one.right + one.missing for one in counts):
        raise ConfigError(f"measure '{name}_f1': none of the {len(counts)} rows has an entity: give more rows")
    rng = random.Random(_SEED)
    draws = [rng.choices(counts, k=len(counts)) for _ in range(_DRAWS)]
    return [_share(f"{name}_f1", counts, draws, micro_f1), _share(f"{name}_row_f1", counts, draws, mean_f1)]


def micro_f1(counts: Sequence[Counts]) -> float:
    """Return F1 of all entities together; 0 where there is none."""
    right = sum(one.right for one in counts)
    named = sum(one.right + one.wrong + one.missing for one in counts)
    return 2 * right / (named + right) if named else 0.0


def mean_f1(counts: Sequence[Counts]) -> float:
    """Return the mean F1 of the rows."""
    return sum(one.f1 for one in counts) / len(counts)


def _share(name: str, counts: Sequence[Counts], draws: Sequence[Sequence[Counts]], f1: Callable[..., float]) -> Share:
    drawn = sorted(map(f1, draws))
    outside = round(_OUTSIDE * len(drawn))
    return as_share(name, "task", f1(counts), len(counts), drawn[outside], drawn[-1 - outside], unit=SHARE)
