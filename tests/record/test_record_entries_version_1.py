"""Journals of an older format: the same runs, written in each version, are the same history."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from safemerge_callback.record import VERSION, read_journal
from safemerge_callback.record.entries import READERS, add_entry, read_history
from safemerge_callback.record.history import History
from safemerge_callback.reports import summary
from safemerge_callback.reports.payload import page_data

JOURNALS = Path(__file__).parent / "journals"
V1, V2 = JOURNALS / "v1.jsonl", JOURNALS / "v2.jsonl"
# What two equal runs differ in.
CLOCKS = ("seconds", "training_seconds", "time")


def timeless(value):
    """The same without clocks, and without the version itself."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in (*CLOCKS, "version")}
    if hasattr(value, "_asdict"):
        return timeless(value._asdict())
    if isinstance(value, list | tuple):
        return [timeless(item) for item in value]
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


def contents(path):
    """All that a history holds, field by field, but for what a clock said."""
    history = read_history(path)
    names = [f.name for f in dataclasses.fields(History) if not f.name.endswith("seconds") and f.name != "title"]
    return {name: timeless(getattr(history, name)) for name in names}


def test_every_version_has_a_stored_journal_with_every_kind_of_line():
    stored = {int(path.stem.removeprefix("v")): read_journal(path) for path in JOURNALS.glob("v*.jsonl")}
    assert stored.keys() == set(range(1, VERSION + 1))
    for version, lines in stored.items():
        assert {line["version"] for line in lines if line["kind"] == "start"} == {version}
        # What no correction of the package writes is in no stored run.
        assert {line["kind"] for line in lines} == READERS.keys() - {"change", "gradient"}


def test_the_same_runs_are_the_same_history_in_both_versions():
    old, new = contents(V1), contents(V2)
    assert old.keys() == new.keys()
    for name, value in new.items():
        assert old[name] == value, name
    gates = [line["gate"] for line in read_journal(V2) if line["kind"] == "check"]
    assert list(dict.fromkeys(gates)) == ["threshold", "calibrated", "reference"]
    assert all(isinstance(cell["limit"], float) for cell in new["cells"].values())


def test_the_same_runs_are_told_alike_in_both_versions():
    pages = [page_data(read_history(path)) for path in (V1, V2)]
    for page, path in zip(pages, (V1, V2), strict=True):
        assert page.pop("title") == path.stem
    assert pages[0] == pages[1]
    tables = [summary(read_history(path)).splitlines() for path in (V1, V2)]
    assert len(tables[0]) == len(tables[1])


def test_the_second_version_has_what_the_first_had_and_each_modules_limit():
    old, new = read_journal(V1), read_journal(V2)
    for before, after in zip(old, new, strict=True):
        assert list(before) == list(after)
        for one, other in zip(before.get("modules", ()), after.get("modules", ()), strict=True):
            if isinstance(one, dict):
                assert one.items() <= other.items()
                assert other.keys() - one.keys() == ({"limit"} if after["kind"] == "check" else set())


@pytest.mark.parametrize(
    ("gate", "knob", "known", "limit"),
    [
        ("threshold", {}, {}, 0.35),
        ("calibrated", {"z_threshold": -2.0}, {"null_std": 0.1}, 0.3),
        ("calibrated", {"z_threshold": -2.0}, {}, math.nan),
        ("reference", {"reference_fraction": 0.5}, {"reference": 0.5}, 0.25),
        ("num_layers", {}, {}, math.nan),
    ],
)
def test_a_line_without_a_limit_has_that_of_the_gates_of_version_1(gate, knob, known, limit):
    module = {"name": "q", "cosine": 0.3, "null_cosine": 0.5, "update_norm": 1.0, "merge": False, "reason": "", **known}
    check = {"kind": "check", "step": 1, "gate": gate, "threshold": 0.35, "num_layers": None, **knob, "seconds": 0.1}
    history = History("run")
    add_entry(history, {**check, "modules": [module]}, "here")
    assert history.cells["q", 1].limit == pytest.approx(limit, nan_ok=True)


def test_a_journal_of_a_version_to_come_is_read_as_far_as_it_is_known(tmp_path):
    path = tmp_path / "safemerge.jsonl"
    lines = [json.loads(line) for line in V2.read_text().splitlines()]
    for line in lines:
        line["news"] = 1
        if line["kind"] == "start":
            line["version"] = VERSION + 1
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"kind": "a later kind", "step": 9}]))
    found, known = contents(path), contents(V2)
    assert {key: found[key] for key in ("cells", "merges", "probes", "events", "best")} == {
        key: known[key] for key in ("cells", "merges", "probes", "events", "best")
    }
