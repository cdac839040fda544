"""A made-up run, written through the real journal, and a real browser to look at its page with."""

import json
import os
import shutil

import pytest

from recipes.example_run import write_example
from safemerge_callback.decision import Edit
from safemerge_callback.record import Journal
from safemerge_callback.record.entries import Sources, change_entry, end_entry, gradient_entry, start_entry
from safemerge_callback.record.history import TermReading
from safemerge_callback.record.progress import Progress


@pytest.fixture(scope="session")
def example(tmp_path_factory):
    """A journal of 4 layers x 7 module types and 12 checks, with merges and probes; not to be changed."""
    return write_example(tmp_path_factory.mktemp("example") / "run", layers=4, checks=12)


# Measure, its unit as a journal has it (None: it has none), and its value at the n-th probe: nobody's share.
SCALES = {
    "translation": ("BLEU", lambda n: 36.5 + n),
    "reward": (None, lambda n: -0.3 - 0.1 * n),
    "same_again": (None, lambda n: -0.3),
    "called_a_share": ("share", lambda n: 0.5 if n < 2 else 36.5),
    "tokens_seen": ("tokens", lambda n: 123_456_000 + n),
    "error_rate": ("", lambda n: None if n == 1 else 3e-7 * n),
}


@pytest.fixture(scope="session")
def scales(example, tmp_path_factory):
    """The journal of `example`, with a task's measures of all sizes and signs in its probes; not to be changed."""
    entries = [json.loads(line) for line in example.read_text().splitlines()]
    for number, entry in enumerate(entry for entry in entries if entry["kind"] == "probe"):
        for name, (unit, value) in SCALES.items():
            row = {"measure": name, "kind": "task", "n": 200, "value": value(number), "low": None, "high": None}
            entry["measures"].append(row if unit is None else {**row, "unit": unit})
    path = tmp_path_factory.mktemp("scales") / "safemerge.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


# The losses of a made-up gradient term at its n-th reading; it has no benign rows in some.
TERM = {"loss": lambda n: 0.02 / (n + 1), "harm": lambda n: 0.03 / (n + 1), "benign": lambda n: 0.01 if n % 3 else None}


@pytest.fixture(scope="session")
def both(example, tmp_path_factory):
    """The journal of `example`, with a gradient term whose readings come every 5 steps; not to be changed."""
    lines = []
    for line in example.read_text().splitlines():
        entry = json.loads(line)
        if entry["kind"] == "check":
            lines += [json.dumps(_term(step)) for step in (entry["step"] - 5, entry["step"])]
        lines.append(line)
    path = tmp_path_factory.mktemp("both") / "safemerge.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def changed(tmp_path_factory):
    """The journal of a run without a subspace in which a correction that is no merge changed two modules four times."""
    path, names = tmp_path_factory.mktemp("changed") / "safemerge.jsonl", ["layers.0.q_proj", "layers.1.q_proj"]
    journal = Journal(path)
    journal.append(start_entry(0, {"subspace": None}, {}, Sources(None, None, None), len(names)))
    for step in (2, 4, 6, 8):
        edits = [Edit(name, 0.0, 0.1) for name in names]
        journal.append(change_entry(step, "shrink", edits, dict.fromkeys(names, 0.9 ** (step // 2)), 0.1))
    journal.append(end_entry(8, Progress(), 0.5, 20.0))
    return path


def _term(step):
    n = step // 5 - 1
    by_kind = {f"loss_{kind}": TERM[kind](n) for kind in ("harm", "benign") if TERM[kind](n) is not None}
    known = {"norm": 0.5 + n, "cosine": -0.01 * n} if n % 2 else {}
    figures = {**by_kind, "rows": 10.0, "interval": 1.0}
    return gradient_entry(step, "replay", TermReading(0.5, TERM["loss"](n), 5, 0.25, **known, figures=figures))


def _chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


# One browser a module, not a session: playwright keeps an event loop running, which other tests' asyncio would meet.
@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = _chromium()
    if path is None:
        pytest.skip("no Chromium is installed (apt-get install chromium, or set CHROMIUM to its path)")
    with playwright.sync_playwright() as driver:
        # Without its sandbox, as playwright does unless asked: containers lack what that needs, and the pages are ours.
        arguments = ["--disable-gpu", "--disable-dev-shm-usage"]
        opened = driver.chromium.launch(executable_path=path, args=arguments, chromium_sandbox=False, timeout=120_000)
        yield opened
        opened.close()
