"""The page on gates has every gate, with its own knob and the default that it has."""

import re
from pathlib import Path

from safemerge_callback.decision import GATES, KNOB, Gate

PAGE = (Path(__file__).parents[1] / "docs" / "gates.md").read_text(encoding="utf-8")


def test_every_gate_is_in_the_table_with_its_knob():
    rows = {
        row[0].strip("` "): row[2]
        for row in (line.strip("|").split("|") for line in PAGE.splitlines() if "| `" in line[:4])
    }
    assert set(rows) == set(GATES)
    for gate, knob in KNOB.items():
        assert f"`{knob}`" in rows[gate]
        own = GATES[gate].knobs
        default = own[0].default if own else getattr(Gate(), knob)
        stated = re.search(r"`, (\S+)", rows[gate])
        assert (stated and float(stated[1])) == default
