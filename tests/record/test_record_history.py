"""A journal read back: what was measured, what was merged, and the table of it."""

import json
import math

import pytest

from safemerge_callback.errors import JournalError
from safemerge_callback.record.entries import read_history
from safemerge_callback.reports import summary


def check(step, cosines, **changed):
    modules = [
        {"name": n, "cosine": c, "null_cosine": 0.5, "update_norm": 1.0, "merge": False, "reason": ""}
        for n, c in cosines.items()
    ]
    entry = {"kind": "check", "step": step, "gate": "threshold", "threshold": 0.35, "num_layers": None, "seconds": 0.25}
    return {**entry, "modules": modules, **changed}


def merge(step, names, left=0.8):
    modules = [{"name": n, "residual": 0.1, "change": 0.3, "task_weight": left} for n in names]
    how = {"method": "linear", "space": "delta", "weights": [0.8, 0.2]}
    return {"kind": "merge", "step": step, **how, "seconds": 0.5, "modules": modules}


@pytest.fixture
def write(tmp_path):
    def make(*entries):
        (tmp_path / "run").mkdir(exist_ok=True)
        path = tmp_path / "run" / "safemerge.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return path

    return make


Q, V = "layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"


def test_cells_merges_and_totals(write):
    path = write(
        {"kind": "start", "version": 1, "step": 0},
        check(0, {Q: 1.0, V: 0.4}),
        check(10, {Q: 0.3, V: None}),
        merge(10, [Q]),
        {"kind": "error", "step": 20, "where": "measure", "error": "ValueError: no"},
        {"kind": "a later release's", "step": 20},
        check(30, {Q: 0.2, V: 0.45}, threshold=0.3),
        merge(30, [Q], left=0.64),
        {"kind": "end", "step": 30},
    )
    history = read_history(path)
    assert history.title == "run"
    assert history.modules == [Q, V]
    assert history.steps == [0, 10, 30]
    assert history.cells[Q, 10].cosine == 0.3
    assert math.isnan(history.cells[V, 10].cosine)
    assert history.cells[V, 10].state == "broken"
    assert history.merges == {(Q, 10): 0.8, (Q, 30): 0.64}
    assert history.rule == "gate threshold 0.3"
    assert history.seconds == pytest.approx(1.75)
    assert read_history(path.parent).merges == history.merges


def test_a_merge_that_is_taken_back_leaves_the_change_of_its_step(write):
    """A change comes before the check of its step, so both may stand at one."""
    change = {"kind": "change", "step": 10, "correction": "shrink", "seconds": 0.1}
    change["modules"] = [{"name": Q, "residual": 0.0, "change": 0.5, "task_weight": 0.5}]
    rollback = {"kind": "rollback", "step": 10, "modules": [Q], "reason": "it cost too much"}
    entries = [change, check(10, {Q: 0.3}), merge(10, [Q], left=0.4)]
    assert read_history(write(*entries)).task_weights == {Q: {10: 0.4}}
    assert read_history(write(*entries)).by_correction == {"merge": {(Q, 10): False}, "shrink": {(Q, 10): False}}
    assert read_history(write(*entries, rollback)).by_correction["merge"] == {(Q, 10): True}
    assert read_history(write(*entries, rollback)).task_weights == {Q: {10: 0.5}}
    alone = read_history(write(change, rollback, check(10, {Q: 0.3})))
    assert (alone.task_weights, alone.by_correction) == ({Q: {10: 1.0}}, {"merge": {}, "shrink": {(Q, 10): True}})


def test_what_has_not_moved_is_no_cosine(write):
    entry = check(0, {"layers.0.a": 1.0, "layers.0.b": 1.0, "layers.0.c": 1.0})
    entry["modules"][0]["update_norm"] = 0.0
    entry["modules"][1]["null_cosine"] = 1.0
    history = read_history(write(entry))
    assert [history.cells[f"layers.0.{n}", 0].state for n in "abc"] == ["still", "still", "measured"]


def test_a_step_checked_twice_counts_once_and_late(write):
    history = read_history(write(check(5, {Q: 0.9}), check(5, {Q: 0.2})))
    assert history.steps == [5]
    assert history.cells[Q, 5].cosine == 0.2


def test_the_table_holds_medians_lowest_and_what_is_left(write):
    names = [f"layers.{i}.mlp.up_proj" for i in range(3)]
    path = write(
        check(0, dict(zip(names, [0.1, 0.5, 0.6], strict=True))),
        check(50, {**dict(zip(names, [0.2, 0.9, 0.3], strict=True)), Q: None}),
        merge(50, names[:1]),
        merge(60, names[:2], left=0.51),
        {"kind": "error", "step": 70, "where": "merge", "error": "boom"},
    )
    text = summary(read_history(path))
    assert "run: 4 modules, 3 checks at steps 0 to 60, gate threshold 0.35" in text
    row = [cell.strip() for cell in next(line for line in text.splitlines() if "up_proj" in line).split("│")[1:-1]]
    assert row == ["up_proj", "3", "0.5000", "0.5000", "0.3000", "0.1000", f"{names[0]} at 0", "3", "0.51"]
    assert "3 merges in 2 modules: method linear, space delta, weights 0.8 / 0.2; 1.5 s in all" in text
    assert "1 fault, the first: step 70, merge: boom" in text
    q_row = [cell.strip() for cell in next(line for line in text.splitlines() if "q_proj" in line).split("│")[1:-1]]
    assert q_row[3:] == ["-", "-", "-", "-", "0", "1"]


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([{"kind": "start"}], "no check yet"),
        ([check(0, {Q: 0.5}), {"kind": "check", "step": 1}], "line 2: not an entry of ours"),
        ([{"step": 1}], "line 1: not an entry of ours"),
        ([check(0, {Q: "high"})], "line 1: not an entry of ours"),
        ([{**merge(0, [Q]), "weights": 3}], "line 1: not an entry of ours"),
        ([{"kind": "probe", "step": 0, "when": "every", "seconds": 1.0}], "line 1: not an entry of ours"),
        ([{"kind": "rollback", "step": 0, "modules": [Q]}], "no check yet and no probe, and no gradient term"),
        ([{"kind": "gradient", "step": 1, "correction": "rows"}], "line 1: not an entry of ours"),
    ],
)
def test_journals_that_are_none(write, entries, match):
    with pytest.raises(JournalError, match=match):
        read_history(write(*entries))


def gradient(step, **more):
    return {"kind": "gradient", "step": step, "correction": "rows", "weight": 0.5, "steps": 10, "seconds": 1.5, **more}


def test_a_run_without_checks_is_summed_up_by_its_terms(write):
    figures = {"rows": 20, "loss_harm": 0.25, "loss_benign": None, "interval": 2}
    lines = [gradient(10, loss=0.5), gradient(20, loss=None), gradient(30, loss=0.125, norm=2, cosine=-0.5)]
    lines[0]["figures"], lines[2]["figures"] = figures, {**figures, "loss_harm": 0.2, "loss_benign": 0.0625}
    end = {
        "kind": "end",
        "step": 31,
        "checks": 0,
        "merges": 0,
        "modules_merged": 0,
        "seconds": 6,
        "training_seconds": 60,
    }
    history = read_history(write(*lines))
    assert summary(history).splitlines() == [
        "run: no check",
        "rows: in 30 steps, 40 rows until step 30, weight 0.5, interval 2; 4.5 s",
        "  loss 0.5 to 0.125, benign 0.0625, harm 0.25 to 0.2",
        "  gradient norm 2 at step 30, cosine to the task's -0.5 at step 30",
    ]
    fault = {"kind": "error", "step": 31, "where": "rows", "error": "boom"}
    text = summary(read_history(write(*lines, fault, end)))
    assert text.startswith("run: no check; 6.0 s in all, 10.0% of the training\n")
    assert "4.5 s, 7.5% of the training" in text
    assert text.endswith("1 fault, the first: step 31, rows: boom")
    # lines of before had neither seconds nor figures
    older = {key: value for key, value in gradient(10, loss=0.5).items() if key != "seconds"}
    assert summary(read_history(write(older))).splitlines()[1:] == [
        "rows: in 10 steps until step 10, weight 0.5; 0.0 s",
        "  loss 0.5",
    ]


def test_terms_are_beneath_the_table_of_a_run_with_checks(write):
    text = summary(read_history(write(check(10, {Q: 0.5}), gradient(10, loss=0.5), merge(10, [Q]), probe(10))))
    lines = text.splitlines()
    first = lines.index("rows: in 10 steps until step 10, weight 0.5; 1.5 s")
    assert lines[first - 1].startswith("1 merge in 1 module")
    assert lines[first + 1] == "  loss 0.5"
    assert lines[first + 2].startswith("probe at step 10")


def test_a_run_that_failed_in_all_it_tried_tells_of_its_faults(write):
    start, fault = {"kind": "start", "step": 0}, {"kind": "error", "step": 1, "where": "rows", "error": "boom"}
    assert summary(read_history(write(start, fault))).endswith("1 fault, the first: step 1, rows: boom")


def test_folders_without_a_journal(write, tmp_path):
    write(check(0, {Q: 0.5}))
    with pytest.raises(JournalError, match="there is one in 'run'"):
        read_history(tmp_path)
    with pytest.raises(JournalError, match="cannot be read"):
        read_history(tmp_path / "nowhere.jsonl")


def probe(step, when="every", value=0.5):
    figure = {"measure": "advbench_refused", "kind": "harm", "n": 8, "value": value, "low": 0.2, "high": 0.8}
    loss = {"measure": "eval_loss", "kind": "task", "n": 4, "value": 2.5, "low": None, "high": None}
    nothing = {
        **figure,
        "measure": "benign_refused",
        "kind": "over_refusal",
        "n": 0,
        "value": None,
        "low": None,
        "high": None,
    }
    measures = [{**figure, "incoherent": 2, "unjudged": 1}, loss, nothing]
    told = {"kind": "probe", "step": step, "when": when, "seconds": 1.5, "mean_tokens": 20.0}
    return {**told, "measures": measures, **({"settings": {"judge": "Keywords"}} if when == "begin" else {})}


def test_probes_rules_starts_and_the_end_are_kept(write):
    history = read_history(
        write(
            {"kind": "start", "version": 1, "step": 0, "config": {"every": 10}},
            probe(0, "begin"),
            check(10, {Q: 0.3, V: 0.4}),
            {"kind": "trigger", "step": 10, "reason": "refusals fell"},
            merge(10, [Q, V]),
            {"kind": "stop", "step": 10, "reason": "enough"},
            {"kind": "end", "step": 10, "seconds": 1.0, "training_seconds": 20.0},
        )
    )
    asked = history.probes[0]
    assert (asked.step, asked.when, asked.seconds, asked.mean_tokens) == (0, "begin", 1.5, 20.0)
    harm, loss, nothing = asked.measures
    assert (harm.n, harm.low, harm.high, harm.incoherent, harm.unjudged) == (8, 0.2, 0.8, 2, 1)
    assert loss.value == 2.5
    assert math.isnan(loss.low)
    assert (harm.text, loss.text, nothing.text) == ("50.0 % (20 to 80), n = 8", "2.5 nats a token, n = 4", "not known")
    assert asked.settings == {"judge": "Keywords"}
    assert history.ended
    assert [(event.step, event.kind, event.reason) for event in history.events] == [
        (10, "trigger", "refusals fell"),
        (10, "stop", "enough"),
    ]
    assert history.starts[0]["config"] == {"every": 10}
    assert history.end["training_seconds"] == 20.0
    assert (history.check_seconds, history.merge_seconds) == (0.25, 0.5)


def test_a_rollback_gives_the_share_of_before_back(write):
    history = read_history(
        write(
            check(10, {Q: 0.3, V: 0.3}),
            merge(10, [Q], left=0.8),
            check(20, {Q: 0.3, V: 0.3}),
            merge(20, [Q, V], left=0.64),
            {"kind": "rollback", "step": 20, "modules": [Q, V], "reason": "eval loss rose by 0.3"},
            check(30, {Q: 0.3, V: 0.3}),
            merge(30, [V], left=0.8),
            {"kind": "undo", "step": 30, "folder": "run", "modules": [V]},
        )
    )
    assert history.task_weights == {Q: {10: 0.8, 20: 0.8}, V: {20: 1.0, 30: 1.0}}
    assert history.undone == {(Q, 20): 0.8, (V, 20): 1.0, (V, 30): 1.0}
    assert history.merges[Q, 20] == 0.64
    assert [(event.kind, event.modules) for event in history.events] == [("rollback", (Q, V)), ("undo", (V,))]
    text = summary(history)
    assert "4 merges in 2 modules, 3 taken back: method linear" in text
    row = [cell.strip() for cell in next(line for line in text.splitlines() if "v_proj" in line).split("│")[1:-1]]
    assert row[-2:] == ["2", "1"]


def test_the_limit_is_what_the_line_says_whatever_its_gate(write):
    for gate, limit in (("threshold", 0.3), ("a later release's", 0.25), ("num_layers", None)):
        entry = check(0, {Q: 0.3}, gate=gate)
        entry["modules"][0]["limit"] = limit
        cell = read_history(write(entry)).cells[Q, 0]
        assert cell.limit == pytest.approx(math.nan if limit is None else limit, nan_ok=True), gate
        assert cell.margin == pytest.approx(0.3 if limit is None else 0.3 - limit), gate


def test_a_run_with_a_probe_alone_is_reported(write):
    path = write(probe(0, "begin"), probe(10), probe(20, "end"))
    history = read_history(path)
    assert history.ended
    assert not history.steps
    assert summary(history).splitlines() == [
        "run: no check, 3 probes",
        "probe at step 20 (end): advbench_refused 50.0 % (20 to 80), n = 8; eval_loss 2.5 nats a token, n = 4; "
        "benign_refused not known",
    ]
    assert not read_history(write(probe(0, "begin"))).ended


def test_the_limit_is_what_the_gate_merges_below_in_all_modules_or_none(write):
    """Whatever the gate is called: a limit that each module has of its own is no line in a picture."""
    entry = check(10, {Q: 0.3, V: 0.4}, gate="a later one")
    for module, limit in zip(entry["modules"], (0.3, 0.3), strict=True):
        module["limit"] = limit
    assert read_history(write(entry)).limit == 0.3
    entry["modules"][1]["limit"] = 0.2
    assert math.isnan(read_history(write(check(5, {Q: 0.3}), entry)).limit)
    assert read_history(write(entry, check(20, {Q: 0.3, V: 0.4}))).limit == 0.35
