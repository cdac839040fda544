import json
from dataclasses import asdict
from typing import Any

import pytest

from safemerge_callback.errors import JournalError
from safemerge_callback.record.progress import Progress, continue_journal, cut, rebuilt


def journal(path, *entries):
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))


START, CHECK, MERGE = ({"kind": kind, "step": step} for kind, step in [("start", 0), ("check", 10), ("merge", 10)])
LATER, END = {"kind": "check", "step": 20}, {"kind": "end", "step": 20}


def test_progress_round_trips_whole():
    progress = Progress(checks=3, seconds=1.25, journal_entries=7)
    progress.record_merge(10, {"a": 0.8, "b": 0.8})
    progress.record_merge(20, {"b": 0.8})
    assert Progress.of(json.loads(json.dumps(asdict(progress)))) == progress
    assert progress.task_weights == {"a": 0.8, "b": pytest.approx(0.64)}
    assert progress.disarmed == ["a", "b"]
    assert (progress.merges, progress.modules_merged, progress.merged_steps, progress.last_merge) == (
        2,
        3,
        [10, 20],
        20,
    )


WRONG: list[dict[str, Any]] = [
    {"checks": "3"},
    {"merges": None},
    {"merges": True},
    {"task_weights": {"a": "0.8"}},
    {"merged_steps": [1.5]},
    {"correction_steps": {"rows": 1.5}},
    {"correction_steps": [1]},
]


@pytest.mark.parametrize("values", [None, [], {}, {"checks": 1}, *({**asdict(Progress()), **one} for one in WRONG)])
def test_values_that_are_no_state_are_refused(values):
    with pytest.raises(ValueError, match=r"it lacks|no mapping| is "):
        Progress.of(values)


def merged(step, **left):
    return {"kind": "merge", "step": step, "modules": [{"name": n, "task_weight": w} for n, w in left.items()]}


def test_counts_are_rebuilt_from_a_journal_without_what_was_taken_back():
    taken_back = {"kind": "rollback", "step": 20, "modules": ["b"], "reason": "it fell"}
    entries = [START, CHECK, merged(10, a=0.8, b=0.8), CHECK, merged(20, b=0.64), taken_back, CHECK, merged(30, a=0.64)]
    expected = Progress(checks=3)
    expected.record_merge(10, {"a": 0.8, "b": 0.8})
    expected.record_merge(30, {"a": 1.0})
    expected.task_weights["a"] = 0.64
    assert rebuilt(entries) == expected
    assert rebuilt([START]) is None
    assert rebuilt([CHECK, {"kind": "merge", "step": 10}]) is None


def test_steps_of_other_corrections_are_rebuilt_too():
    gradient = {"kind": "gradient", "step": 10, "correction": "rows", "steps": 10}
    change = {"kind": "change", "step": 12, "correction": "shrink", "modules": [{"name": "a", "task_weight": 0.5}]}
    taken_back = {"kind": "rollback", "step": 14, "modules": ["a"], "reason": "it fell"}
    entries = [START, gradient, change, {**gradient, "steps": 3}, {**change, "step": 14}, taken_back]
    progress = rebuilt(entries)
    assert progress == Progress(correction_steps={"rows": 13, "shrink": 1}, task_weights={"a": 0.5})
    assert Progress.of(json.loads(json.dumps(asdict(progress)))) == progress
    assert rebuilt([START, {**gradient, "steps": "x"}]) is None


def test_rewind_takes_the_weights_history_and_leaves_the_counts():
    progress = Progress(merges=4, last_merge=40, task_weights={"a": 0.4})
    progress.rewind(Progress(merges=1, last_merge=10, task_weights={"a": 0.8}, disarmed=["a"]))
    assert (progress.merges, progress.last_merge, progress.task_weights, progress.disarmed) == (
        4,
        10,
        {"a": 0.8},
        ["a"],
    )
    progress.rewind(None)
    assert (progress.merges, progress.last_merge, progress.task_weights, progress.disarmed) == (4, None, {}, [])


def test_a_state_of_before_there_was_rearming_is_read():
    older = asdict(Progress(checks=2))
    del older["disarmed"]
    assert Progress.of(older) == Progress(checks=2)


def test_a_resumed_run_keeps_what_its_checkpoint_knew():
    entries = [START, CHECK, MERGE, LATER, END]
    assert cut(entries, 10, None) == [START, CHECK, MERGE]
    assert cut(entries, 10, 2) == [START, CHECK]
    assert cut(entries, 20, None) == [START, CHECK, MERGE, LATER]


def test_journal_cut_back_on_resume_and_set_aside_on_a_new_start(tmp_path):
    path = tmp_path / "run" / "safemerge.jsonl"
    assert continue_journal(path, 0, None) == []
    path.parent.mkdir()
    journal(path, START, CHECK, MERGE, LATER, END)
    assert continue_journal(path, 10, 3) == [START, CHECK, MERGE]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [START, CHECK, MERGE]
    assert continue_journal(path, 0, None) == []
    assert not path.exists()
    journal(path, START)
    continue_journal(path, 0, None)
    assert sorted(p.name for p in path.parent.iterdir()) == ["safemerge.1.jsonl", "safemerge.2.jsonl"]


def test_a_journal_that_is_none_is_not_overwritten(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nmore\n")
    for step in (0, 10):
        with pytest.raises(JournalError, match="line 1"):
            continue_journal(path, step, None)
    assert path.read_text() == "my notes\nmore\n"
