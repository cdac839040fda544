"""The page on the journal has every kind of line and every key that is written, and no other."""

import re
from pathlib import Path

import pytest

from safemerge_callback import read_journal
from safemerge_callback.decision import GATES, Edit, MergePlan, Reading, Readings
from safemerge_callback.methods import METHODS
from safemerge_callback.record import VERSION
from safemerge_callback.record.entries import READERS, change_entry, check_entry, gradient_entry, merge_entry
from safemerge_callback.record.history import TermReading
from safemerge_callback.signals.module_signals import MODULE_SIGNALS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "journal.md").read_text(encoding="utf-8")
SECTIONS = {match[1]: match[2] for match in re.finditer(r"^## `?(.+?)`?\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)}
EVERYWHERE = {"kind", "step", "time"}
# Objects whose keys are names that a user gave, or another document's.
OPEN = {
    "start": {"config", "versions", "left_out", "prepared", "subspace.aligned", "subspace.unaligned"},
    "merge": {"module_weights", "focal", "learned"},
    "gradient": {"figures"},
    "probe": {"settings.prompts", "settings.rules", "settings.chat_template_kwargs"},
}
# What a method cannot do without, or writes only where it is given.
HOW = {
    **{name: {"density": 0.5} for name, rule in METHODS.items() if "density" in rule.takes},
    **{name: {"strength": 0.5} for name in ("pull", "ema", "orthogonal")},
    "project": {"operator": "orthogonal", "operator_rank": 2},
}
# What the stored run has none of, since only some settings write it, or it is older.
RARE = {
    "probe": {"settings.chat_template_kwargs", "settings.system", "measures[].outcomes", "measures[].prompts"},
    "start": {"prepared"},
}


def documented(section):
    """The keys in the first column of a section's table."""
    rows = re.findall(r"^\| (`.+?) \|", SECTIONS[section], re.M)
    return {key for row in rows for key in re.findall(r"`(.+?)`", row)}


def keys_of(entry, closed, before=""):
    """Every key of an entry as the page writes it: `a.b` within an object, `a[].b` within those of a list."""
    for key, value in entry.items():
        name = f"{before}{key}"
        if isinstance(value, dict) and name not in closed:
            yield from keys_of(value, closed, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                yield from keys_of(item, closed, f"{name}[].")
        else:
            yield name


def lines():
    """Lines of every kind: a stored training's, and a check of every gate and a merge by every method."""
    yield change_entry(1, "shrink", [Edit("a", 0.0, 0.1)], {"a": 0.8}, 0.1)
    yield gradient_entry(1, "rows", TermReading(0.5, 2.0, 10, 0.5, 3.0, -0.1, {"rows": 10}))
    yield from read_journal(ROOT / "tests" / "record" / "journals" / f"v{VERSION}.jsonl")
    known = {"null_std": 0.1, "reference": 0.5, "signed_cosine": 0.0, "signals": dict.fromkeys(MODULE_SIGNALS, 0.1)}
    readings = Readings(Reading(name, 0.4, 0.7, 1.0, 4, (8, 8), **known) for name in ("a", "b"))
    for gate in GATES:
        own = {"num_layers": {"num_layers": 1}, "quantile": {"quantile": 0.5}}.get(gate, {})
        yield check_entry(1, MergePlan.decide(readings, gate=gate, **own), 0.1, measured_at=0)
    for method, rule in METHODS.items():
        plan = MergePlan.decide(readings, gate="all", method=method, space=rule.spaces[0], **HOW.get(method, {}))
        yield merge_entry(1, plan, [Edit("a", 0.0, 0.1)], {"a": 0.8}, 0.1)
    for chosen in ({"weights": (0.8, 0.1, 0.1), "focal": ["10", "01"]}, {"learned": "run"}):
        plan = MergePlan.decide(readings, gate="all", method="linear", **chosen)
        yield merge_entry(1, plan, [Edit("a", 0.0, 0.1, 0.9, 0.4)], {"a": 0.8}, 0.1)


def written():
    """The keys of all lines, by kind."""
    found = {}
    for line in lines():
        found.setdefault(line["kind"], set()).update(keys_of(line, OPEN.get(line["kind"], ())))
    return found


def test_every_kind_has_a_section():
    assert READERS.keys() <= SECTIONS.keys()
    assert documented("Every line") == EVERYWHERE
    assert written().keys() == READERS.keys()


@pytest.mark.parametrize("kind", READERS)
def test_every_key_is_on_the_page_and_no_other(kind):
    found = written()[kind] - EVERYWHERE
    assert documented(kind) - RARE.get(kind, set()) == found


def test_the_page_tells_of_every_version():
    rows = re.findall(r"^\| (\d+) \|", SECTIONS["What a reader may rely on"], re.M)
    assert rows == [str(version) for version in range(1, VERSION + 1)]


def test_a_key_that_the_page_lacks_is_found():
    entry = {"kind": "check", "modules": [{"name": "a", "news": 1}], "more": {"deep": 1}}
    assert set(keys_of(entry, ())) - EVERYWHERE - documented("check") == {"modules[].news", "more.deep"}
