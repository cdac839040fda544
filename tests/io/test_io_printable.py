"""What a terminal would obey is written out, wherever a text from outside is printed."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from safemerge_callback.cli import app
from safemerge_callback.decision import Reading, Readings
from safemerge_callback.io.printable import printable
from safemerge_callback.io.text_table import render
from safemerge_callback.reports import watch_run
from safemerge_callback.reports.table import readings_text
from safemerge_callback.subspace import bar
from safemerge_callback.subspace.header import FileHeader, ModuleHeader
from safemerge_callback.subspace.table import render as describe

# Clears the screen, sets the window's title, turns the order of letters, begins a line, is no letter at all, markup.
EVIL = "layers.0.\x1b[2J\x1b]0;owned\x07\u202eq\u2066\nsafemerge: all is well[red]k[/red]\ud800"
KINDS = ("\x1b", "\x07", "\u202e", "\u2066", "\ud800", "\x9b")


def journal(folder, name=EVIL[:-1]):
    module = {"name": name, "cosine": 0.3, "null_cosine": 0.4, "update_norm": 1.0, "merge": True, "reason": name}
    check = {"kind": "check", "step": 1, "gate": name, "threshold": 0.35, "num_layers": None, "seconds": 0.1}
    merge = {"kind": "merge", "step": 1, "method": name, "space": name, "weights": [0.8, 0.2], "seconds": 0.1}
    figure = {"measure": name, "kind": name, "n": 3, "value": 0.5, "low": 0.1, "high": 0.9}
    entries = [
        {"kind": "start", "step": 0, "config": {name: name}},
        {**check, "modules": [module]},
        {**merge, "modules": [{"name": name, "residual": 0.1, "task_weight": 0.8}]},
        {"kind": "probe", "step": 1, "when": name, "seconds": 1.0, "measures": [figure]},
        {"kind": "stop", "step": 1, "reason": name},
        {"kind": "error", "step": 1, "where": name, "error": name},
    ]
    path = folder / "safemerge.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def watched(folder):
    out = io.StringIO()
    watch_run(journal(folder), once=True, console=Console(file=out, width=300, color_system=None))
    return out.getvalue()


def reported(folder):
    done = CliRunner().invoke(app, ["report", str(journal(folder)), "-o", str(folder / "r.html")])
    assert done.exit_code == 0, done.output
    return done.output


def measured(_):
    one = Reading(EVIL, 0.1, 0.2, 1.0, None, (4, 4), 2)
    return readings_text(Readings([one]), 0.5)


def described(_):
    module = ModuleHeader((4, 4), "dense", None, "float32", 1.0, 0.5)
    return describe(EVIL, FileHeader({"source": EVIL}, {"source": EVIL}, {EVIL: module}, unmoved=[EVIL]))


def refused(folder):
    return CliRunner().invoke(app, ["measure", str(folder / EVIL[:-1]), "-s", str(folder / "x\x1b[2J\ny")]).output


PRINTED = {
    "watch": watched,
    "report": reported,
    "measure": measured,
    "describe": described,
    "refusal": refused,
    "table": lambda _: render(EVIL, ["a"], [[EVIL]]),
    "bar": lambda _: bar._ending(EVIL),
}


@pytest.mark.parametrize("who", PRINTED)
def test_nothing_from_outside_reaches_the_terminal_as_a_command(tmp_path, who):
    text = PRINTED[who](tmp_path)
    assert not [letter for letter in KINDS if letter in text]
    assert "\nsafemerge: all is well" not in text
    assert "\\x1b" in text or who in ("bar", "refusal")  # cut short
    text.encode()


def test_markup_of_names_is_shown_and_not_followed():
    assert "[red]k[/red]" in described(None)
    assert "[red]k[/red]" in render("t", ["a"], [[EVIL]])


def test_what_is_no_command_stays():
    for text in ("layers.0.q_proj", "ρ × − 漢字 é 🙂", "a\u00a0b", "a b"):
        assert printable(text) == text
    assert printable("a\nb\tc") == "a\\nb\\tc"
    assert printable("a\nb\x1b", lines=True) == "a\nb\\x1b"


@given(st.text())
def test_any_text_can_be_printed(text):
    shown = printable(text)
    shown.encode()
    assert "\n" not in shown
    assert printable(shown) == shown
