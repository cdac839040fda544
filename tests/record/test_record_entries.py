"""Every kind of line: what its writer makes goes through the file, and its reader gives it back."""

import ast
import math
from pathlib import Path

import pytest

from safemerge_callback.decision import Edit, MergePlan, Reading, Readings
from safemerge_callback.evaluation.measure import as_share
from safemerge_callback.evaluation.probe import Answers
from safemerge_callback.record import VERSION, Journal, numbered_entries
from safemerge_callback.record.entries import (
    READERS,
    Sources,
    add_entry,
    best_entry,
    change_entry,
    check_entry,
    end_entry,
    error_entry,
    gradient_entry,
    merge_entry,
    probe_entry,
    rollback_entry,
    start_entry,
    stop_entry,
    trigger_entry,
    undo_entry,
    undo_noted,
    versions_of,
)
from safemerge_callback.record.history import Best, Cell, Event, History, Measured, Probe, TermReading
from safemerge_callback.record.progress import Progress

PACKAGE = Path(__file__).parents[2] / "safemerge_callback"
NAN = pytest.approx(math.nan, nan_ok=True)


def a_plan(**knobs):
    readings = [
        Reading("a", 0.2, 0.7, 1.5, 4, (8, 8), null_std=0.1, reference=0.5, signed_cosine=-0.1),
        Reading("b", 0.9, 0.7, 2.5, 4, (8, 8), null_std=0.1, reference=0.5, interval=(0.85, 0.95)),
        Reading("c", math.nan, 0.7, math.inf, 4, (8, 8), null_std=0.1, reference=0.5),
        Reading("d", 1.0, 0.7, 0.0, 4, (8, 8), null_std=0.1, reference=0.5, reread=True),
    ]
    return MergePlan.decide(Readings(readings), **(knobs or {"threshold": 0.35}))


@pytest.fixture
def read(tmp_path):
    """Write entries into a file and read them back: the lines as they are there, and their history."""

    def through_a_file(*entries):
        journal, history = Journal(tmp_path / "safemerge.jsonl"), History("run")
        for entry in entries:
            # What is cut short of this beginning may be cut off when the journal is opened again.
            assert next(iter(entry)) == "kind"
            journal.append(entry)
        lines = list(numbered_entries(journal.path).values())
        for line in lines:
            add_entry(history, line, "here")
        return lines, history

    return through_a_file


def test_start(read):
    sources = Sources("v.safetensors", {"source": "chat"}, {"source": "base"})
    of_a_training = {
        "placement": {"kind": "host"},
        "world_size": 2,
        "planned": {"merges": 3, "left": None, "exact": True},
        "restored": False,
        "left_out": {},
        "prepared": {"replay": 1.5},
    }
    versions = versions_of("torch", "no-such-distribution")
    (line, plain), history = read(
        start_entry(4, {"gate": "all"}, versions, sources, 12, **of_a_training),
        start_entry(0, {}, {}, Sources(None, None, None), 1),
    )
    assert history.starts[0] == line
    assert history.prepared == {"replay": 1.5}
    assert line["version"] == VERSION
    assert {key: line[key] for key in of_a_training} == of_a_training
    assert (line["step"], line["config"], line["num_modules"]) == (4, {"gate": "all"}, 12)
    assert line["subspace"] == sources._asdict()
    assert versions["torch"]
    assert line["versions"] == versions
    assert line["versions"]["no-such-distribution"] is None
    # What a merge of files has none of is not there.
    assert plain.keys() & of_a_training.keys() == set()


def test_check(read):
    plan = a_plan()
    (line,), history = read(check_entry(10, plan, 0.25, measured_at=9))
    assert (history.gate, history.threshold, history.knob, history.num_layers) == ("threshold", 0.35, 0.35, None)
    assert (history.check_seconds, history.steps, line["measured_at"]) == (0.25, [10], 9)
    a, b, c, d = (history.cells[name, 10] for name in "abcd")
    assert a == Cell(0.2, 0.7, "measured", 1.5, True, "cosine 0.2000 < 0.35", 0.35, -0.8)
    assert b == Cell(0.9, 0.7, "measured", 2.5, False, plan.verdicts["b"].reason, 0.35, NAN)
    # No cosine decides on these two, so that nothing is a limit to them.
    assert c == Cell(NAN, 0.7, "broken", NAN, False, plan.verdicts["c"].reason, NAN, NAN)
    assert d == Cell(1.0, 0.7, "still", 0.0, False, "has not moved", NAN, NAN)
    assert [m.get("interval") for m in line["modules"]] == [None, [0.85, 0.95], None, None]
    assert [m.get("reread") for m in line["modules"]] == [None, None, None, True]
    assert "measured_at" not in check_entry(10, plan, 0.25)


@pytest.mark.parametrize(
    ("gate", "knobs", "limit"),
    [
        ("threshold", {"threshold": 0.4}, 0.4),
        ("calibrated", {"z_threshold": -2.0}, 0.5),
        ("reference", {"reference_fraction": 0.5}, 0.25),
        ("opposed", {}, None),
        ("num_layers", {"num_layers": 1}, None),
        ("quantile", {"quantile": 0.5}, None),
        ("gap", {}, None),
        ("random", {}, None),
        ("all", {}, None),
        ("watch", {}, None),
    ],
)
def test_each_module_has_the_limit_that_its_gate_merged_below(read, gate, knobs, limit):
    known = {"null_std": 0.1, "reference": 0.5, "signed_cosine": 0.0}
    readings = Readings(Reading(n, c, 0.7, 1.0, 4, (8, 8), **known) for n, c in (("a", 0.2), ("b", 0.9)))
    plan = MergePlan.decide(readings, gate=gate, **knobs)
    (line,), history = read(check_entry(1, plan, 0.1))
    assert [m["limit"] for m in line["modules"]] == [pytest.approx(limit)] * 2
    assert all(m.keys() >= set(plan.gate.criterion.notes) for m in line["modules"])
    assert history.cells["a", 1].limit == pytest.approx(math.nan if limit is None else limit, nan_ok=True)
    assert history.rule == f"gate {plan.gate}"


def test_merge(read):
    average = {"decay": 0.9, "followed": 7, "residual": 0.01}
    edits = (Edit("a", 0.05, math.inf),)
    (line,), history = read(merge_entry(20, a_plan(), edits, {"a": 0.64, "b": 0.8}, 0.5, average))
    assert history.merges == {("a", 20): 0.64}
    assert history.residuals == {("a", 20): 0.05}
    assert (history.how, history.merge_seconds) == ("method linear, space delta, weights 0.8 / 0.2", 0.5)
    assert line["modules"] == [{"name": "a", "residual": 0.05, "change": None, "task_weight": 0.64}]
    assert line["average"] == {"decay": 0.9, "followed": 7, "residual": 0.01}
    own = a_plan(gate="all", module_weights={"a": (0.5, 0.5)})
    varied = merge_entry(20, own, edits, {"a": 0.5}, 0.5)
    assert varied["module_weights"] == {"a": [0.5, 0.5]}
    assert varied["modules"][0]["weights"] == [0.5, 0.5]
    assert "average" not in varied


@pytest.mark.parametrize(
    ("entry", "event"),
    [
        (rollback_entry(20, ["a"], "it cost too much"), Event(20, "rollback", "it cost too much", ("a",))),
        (undo_entry(20, "run", ["a"]), Event(20, "undo", "undone by hand", ("a",))),
    ],
)
def test_what_was_taken_back(read, entry, event):
    merged = merge_entry(20, a_plan(), (Edit("a", 0.0, 0.1),), {"a": 0.8}, 0.5)
    lines, history = read(merged, entry)
    assert history.events == [event]
    assert history.undone == {("a", 20): 1.0}
    noted = undo_noted(lines, undo_entry(20, "run", ["a"]))
    assert noted == (entry["kind"] == "undo")
    assert not undo_noted([*lines, lines[0]], undo_entry(20, "run", ["a"]))
    assert not undo_noted(lines, undo_entry(20, "checkpoint-20", ["a"]))


def test_probe(read):
    counts = {"incoherent": 1, "unjudged": 2, "thoughts": 3, "unfinished": 4}
    harm = as_share("bad_refused", "harm", 0.5, 8, 0.2, 0.8, **counts)
    answers = Answers((harm, as_share("task", "task", math.nan, unit="BLEU")), 21.5, 1.5)
    _, history = read(probe_entry(3, "begin", answers, {"judge": "keywords"}), probe_entry(5, "end", answers))
    found = (
        Measured("bad_refused", "harm", 8, 0.5, 0.2, 0.8, 1, 2, "share", 3, 4),
        Measured("task", "task", 0, NAN, NAN, NAN, unit="BLEU"),
    )
    first, last = history.probes
    assert first == Probe(3, "begin", 1.5, found, 21.5, {"judge": "keywords"})
    assert last == Probe(5, "end", 1.5, found, 21.5, {})


def test_rules(read):
    _, history = read(trigger_entry(5, "refusals fell"), stop_entry(7, "they stay low"))
    assert history.events == [Event(5, "trigger", "refusals fell"), Event(7, "stop", "they stay low")]


def test_error(read):
    _, history = read(error_entry(6, "measure", "ValueError: no"))
    assert history.faults == ["step 6, measure: ValueError: no"]


def test_best(read):
    _, history = read(best_entry(8, "checkpoint-6", 2.5, 2.25, None))
    assert history.best == Best(8, "checkpoint-6", 2.5, 2.25, None)


def test_end(read):
    counts = Progress(checks=3, merges=2, modules_merged=6)
    start = start_entry(0, {}, {}, Sources(None, None, None), 3)
    (_, line), history = read(start, end_entry(8, counts, 1.5, 60.0))
    assert history.end == line
    assert history.ended
    told = {"step": 8, "checks": 3, "merges": 2, "modules_merged": 6, "seconds": 1.5, "training_seconds": 60.0}
    assert told.items() <= line.items()
    assert "training_seconds" not in end_entry(0, counts, 1.5)
    assert not read(start)[1].ended


def test_a_change_goes_on_from_the_shares_and_is_taken_back(read):
    edits = [Edit("a", 0.1, 0.2), Edit("b", 0.0, 0.2)]
    lines = [
        merge_entry(10, a_plan(), edits, {"a": 0.8, "b": 0.8}, 0.5),
        change_entry(20, "shrink", edits, {"a": 0.4}, 0.25),
        rollback_entry(20, ["a"], "it cost too much"),
    ]
    told, history = read(*lines)
    assert [line["task_weight"] for line in told[1]["modules"]] == [0.4, 1.0]
    assert history.task_weights["a"] == {10: 0.8, 20: 0.8}
    assert history.task_weights["b"] == {10: 0.8, 20: 1.0}
    assert history.residuals["a", 20] == 0.1
    assert history.seconds == 0.75


def test_a_gradient_term(read):
    """What is known of it comes back; a line of before had neither seconds nor figures."""
    whole = TermReading(0.5, 2.0, 10, 1.5, 3.0, -0.25, {"rows": 4.0})
    unknown = TermReading(0.5, math.nan, 10, 0.5)
    (_, other), history = read(gradient_entry(10, "rows", whole), gradient_entry(20, "rows", unknown))
    assert history.terms["rows"][10] == whole
    assert {"norm", "cosine", "figures"}.isdisjoint(other)
    assert history.losses["rows"][10] == 2.0
    assert math.isnan(history.losses["rows"][20])
    older = {"kind": "gradient", "step": 30, "correction": "rows", "weight": 0.5, "loss": 1.0, "steps": 10}
    add_entry(history, older, "here")
    reading = history.terms["rows"][30]
    assert reading[:3] == (0.5, 1.0, 10)
    assert reading.numbers() == {"loss": 1.0}
    assert whole.numbers() == {"rows": 4.0, "loss": 2.0, "seconds": 1.5, "norm": 3.0, "cosine": -0.25}


def kinds_written(path):
    """The kinds of the dict literals of a file that are lines of a journal, with where they stand."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
        for key, value in pairs:
            if isinstance(key, ast.Constant) and key.value == "kind" and isinstance(value, ast.Constant):
                yield value.value, f"{path.name}:{node.lineno}"


def test_every_kind_that_is_written_has_a_reader_and_is_written_beside_it():
    written = {path: list(kinds_written(path)) for path in sorted(PACKAGE.rglob("*.py"))}
    entries = PACKAGE / "record" / "entries"
    assert [where for path, found in written.items() if entries not in path.parents for _, where in found] == []
    writers = {kind: path for path, found in written.items() for kind, _ in found}
    readers = {kind: Path(read.__code__.co_filename) for kind, read in READERS.items()}
    assert writers == readers


def test_a_kind_that_is_written_elsewhere_is_found(tmp_path):
    (tmp_path / "more.py").write_text('note({"kind": "late", "step": 3})\nnote({"kind": kind})\n')
    assert list(kinds_written(tmp_path / "more.py")) == [("late", "more.py:1")]
