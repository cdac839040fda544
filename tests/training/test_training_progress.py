import json

import pytest

from safemerge_callback.errors import JournalError
from safemerge_callback.training.progress import Progress, continue_journal, cut, find_progress


def journal(path, *entries):
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))


START, CHECK, MERGE = ({"kind": kind, "step": step} for kind, step in [("start", 0), ("check", 10), ("merge", 10)])
LATER, END = {"kind": "check", "step": 20}, {"kind": "end", "step": 20}


def test_progress_round_trips_whole(tmp_path):
    progress = Progress(checks=3, seconds=1.25, journal_entries=7)
    progress.record_merge(10, {"a": 0.8, "b": 0.8})
    progress.record_merge(20, {"b": 0.8})
    progress.save(tmp_path)
    assert Progress.load(tmp_path) == progress
    assert progress.task_weights == {"a": 0.8, "b": pytest.approx(0.64)}
    assert progress.disarmed == ["a", "b"]
    assert (progress.merges, progress.modules_merged, progress.merged_steps, progress.last_merge) == (
        2,
        3,
        [10, 20],
        20,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["safemerge_state.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"checks": 1}', "\x00"])
def test_an_unreadable_state_counts_as_none(tmp_path, text):
    (tmp_path / "safemerge_state.json").write_text(text)
    assert Progress.load(tmp_path) is None
    assert Progress.load(tmp_path / "absent") is None


def test_find_progress_takes_the_first_folder_that_has_one_and_nothing_at_step_zero(tmp_path):
    (tmp_path / "b").mkdir()
    Progress(checks=5).save(tmp_path / "b")
    assert find_progress(10, [tmp_path / "a", tmp_path / "b"]) == Progress(checks=5)
    assert find_progress(0, [tmp_path / "b"]) is None
    assert find_progress(10, []) is None


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


def test_a_state_of_before_there_was_rearming_is_read(tmp_path):
    Progress(checks=2).save(tmp_path)
    older = json.loads((tmp_path / "safemerge_state.json").read_text())
    del older["disarmed"]
    (tmp_path / "safemerge_state.json").write_text(json.dumps(older))
    assert Progress.load(tmp_path) == Progress(checks=2)


def test_a_resumed_run_keeps_what_its_checkpoint_knew():
    entries = [START, CHECK, MERGE, LATER, END]
    assert cut(entries, 10, None) == [START, CHECK, MERGE]
    assert cut(entries, 10, 2) == [START, CHECK]
    assert cut(entries, 20, None) == [START, CHECK, MERGE, LATER]


def test_journal_cut_back_on_resume_and_set_aside_on_a_new_start(tmp_path):
    path = tmp_path / "run" / "safemerge.jsonl"
    assert continue_journal(path, 0, None) == 0
    path.parent.mkdir()
    journal(path, START, CHECK, MERGE, LATER, END)
    assert continue_journal(path, 10, 3) == 3
    assert [json.loads(line) for line in path.read_text().splitlines()] == [START, CHECK, MERGE]
    assert continue_journal(path, 0, None) == 0
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
