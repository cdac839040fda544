import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from safemerge_callback.errors import JournalError
from safemerge_callback.record import Journal, read_journal
from safemerge_callback.record.progress import continue_journal
from safemerge_callback.record.progress import cut as kept_entries

WRITER = """
import sys
from safemerge_callback.record import Journal
journal = Journal(sys.argv[1])
for step in range(10**9):
    journal.append({"kind": "check", "step": step, "modules": [{"name": "m" * 2000}] * 20})
"""


def test_entries_come_back_in_order_with_the_time(tmp_path):
    path = tmp_path / "new" / "folder" / "safemerge.jsonl"
    journal = Journal(path)
    journal.append(
        {"kind": "start", "step": 0, "config": {"path": Path("x"), "weights": (0.8, 0.2)}, "naïve": "‖ΔW‖\n"}
    )
    Journal(path).append({"kind": "end", "step": 60})
    start, end = read_journal(path)
    assert start["config"] == {"path": "x", "weights": [0.8, 0.2]}
    assert start["naïve"] == "‖ΔW‖\n"
    assert (start["kind"], end["kind"], end["step"]) == ("start", "end", 60)
    written = datetime.fromisoformat(end["time"])
    assert written.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - written) < timedelta(minutes=1)
    assert path.read_bytes().count(b"\n") == 2


def test_nan_and_infinity_become_null(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"kind": "check", "deep": [{"x": math.nan, "y": (math.inf, -math.inf, 1.5)}]})
    assert read_journal(journal.path)[0]["deep"] == [{"x": None, "y": [None, None, 1.5]}]
    json.loads(journal.path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_every_cut_of_the_last_line_is_survived_and_written_on_from(tmp_path):
    path = tmp_path / "j.jsonl"
    for step in range(3):
        Journal(path).append({"kind": "check", "step": step, "word": "é"})
    whole = path.read_bytes()
    second = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(second, len(whole)):
        path.write_bytes(whole[:cut])
        if cut > second:
            with pytest.warns(UserWarning, match="line 3 was cut off by a full disk or a crash"):
                assert [e["step"] for e in read_journal(path)] == [0, 1]
        Journal(path).append({"kind": "check", "step": 7})
        assert [e["step"] for e in read_journal(path)] == [0, 1, 7]
    path.write_bytes(whole + b"\0" * 40)
    Journal(path).append({"kind": "check", "step": 8})
    assert [e["step"] for e in read_journal(path)] == [0, 1, 2, 8]


def test_a_disk_that_is_full_for_a_while_costs_no_line_and_no_entry(tmp_path, full_disk):
    journal = Journal(tmp_path / "j.jsonl")
    assert journal.append({"kind": "check", "step": 0}) == 1
    whole = journal.path.read_bytes()
    for step in (1, 2):
        with full_disk(len(whole) + 20), pytest.raises(JournalError, match="cannot be written: File too large"):
            journal.append({"kind": "check", "step": step, "modules": ["m" * 100]})
        assert journal.path.read_bytes() == whole
    assert journal.append({"kind": "check", "step": 3}) == 3
    assert [e["step"] for e in read_journal(journal.path)] == [0, 1, 2, 3]


def test_what_a_failed_write_left_is_cut_before_the_next_append(tmp_path, monkeypatch):
    monkeypatch.setattr("safemerge_callback.record.journal._BLOCK", 16)
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"kind": "check", "step": 0})
    with journal.path.open("ab") as file:
        file.write(b'{"kind": "check", "step": 1, "mod' + b"m" * 100)
    journal.append({"kind": "check", "step": 2})
    assert [e["step"] for e in read_journal(journal.path)] == [0, 2]


def test_torn_lines_are_passed_over_wherever_they_stand_and_what_was_written_behind_them_is_read(tmp_path):
    path, entry = tmp_path / "j.jsonl", '{"kind": "check", "step": %d, "modules": [{"kind": "m"}], "time": ""}'
    torn = entry % 1
    for cut in range(1, len(torn)):
        path.write_text(f"{entry % 0}\n{torn[:cut]}\n{torn[:cut]}{entry % 2}\n{entry % 3}\n")
        with pytest.warns(UserWarning, match="2 lines, first line 2, were cut off") as told:
            assert [e["step"] for e in read_journal(path)] == [0, 2, 3]
        assert len(told) == 1
    path.write_bytes(b"\0" * 40 + b"\n" + (entry % 0).encode() + b"\n\0\0" + (entry % 1).encode() + b"\n")
    with pytest.warns(UserWarning, match="2 lines, first line 1, were cut off"):
        assert [e["step"] for e in read_journal(path)] == [0, 1]


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    path = tmp_path / "j.jsonl"
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    try:
        deadline = time.monotonic() + 120
        while not path.exists() or path.read_bytes().count(b"\n") < 20:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    journal = Journal(path)
    steps = [e["step"] for e in read_journal(path)]
    assert len(steps) >= 20
    assert steps == list(range(len(steps)))
    journal.append({"kind": "end", "step": -1})
    assert [e["step"] for e in read_journal(path)] == [*steps, -1]


def test_a_corrupt_line_elsewhere_is_named(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"kind": "start"}\nkind: che\n{"kind": "end"}\n')
    with pytest.raises(JournalError, match="line 2: not JSON"):
        read_journal(path)
    with pytest.raises(JournalError, match="line 2"):
        Journal(path)
    path.write_text("[1, 2]\n")
    with pytest.raises(JournalError, match="line 1: not a JSON object but list"):
        read_journal(path)
    path.write_bytes(b'{"kind": "\xff"}\n')
    with pytest.raises(JournalError, match="line 1: not JSON"):
        read_journal(path)
    with pytest.raises(JournalError, match="cannot be read"):
        read_journal(tmp_path / "none.jsonl")


def test_a_file_that_is_no_journal_is_not_touched(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("buy milk")
    with pytest.raises(JournalError, match="exists and is no journal"):
        Journal(path)
    assert path.read_text() == "buy milk"


def test_a_place_that_cannot_be_written_is_refused_when_opened(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "j.jsonl", tmp_path):
        with pytest.raises(JournalError, match="cannot be written"):
            Journal(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the kernel has no full disk to offer")
def test_a_full_disk_is_reported(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.path.unlink()
    journal.path.symlink_to("/dev/full")
    with pytest.raises(JournalError, match="cannot be written: No space left"):
        journal.append({"kind": "end"})


def test_a_value_without_a_word_in_json_is_refused_and_nothing_is_written(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    with pytest.raises(JournalError, match=r"entry 'start' cannot be written as JSON.*set"):
        journal.append({"kind": "start", "config": {1, 2}})
    assert read_journal(journal.path) == []


def test_other_ranks_touch_nothing(tmp_path):
    Journal(tmp_path / "deep" / "j.jsonl", enabled=False).append({"kind": "end"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "a"}\n{"prompt": "b"}\n',  # somebody's data, whole lines
        '{"model_type": "llama"}',  # one line without its end, as of a crash
        '{\n  "model_type": "llama"\n}\n',
        "{",
        "kind: start\n",
    ],
)
def test_a_file_of_another_kind_is_no_journal_and_stays_as_it_is(tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    if content == "{":  # the beginning of a line of ours, cut short
        Journal(path)
        return
    with pytest.raises(JournalError):
        continue_journal(path, 0, None)
    assert path.read_text() == content
    with pytest.raises(JournalError):
        Journal(path)
    assert [one.name for one in tmp_path.iterdir()] == ["mine.jsonl"]


def test_a_pipe_or_a_device_is_no_journal(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for use in (Journal, read_journal):
        for path in (tmp_path / "pipe", "/dev/zero", "/dev/full"):
            with pytest.raises(JournalError, match="no regular file"):
                use(path)


def test_a_giant_is_no_journal(tmp_path):
    with (tmp_path / "giant").open("wb") as file:
        file.truncate(1 << 42)
    for use in (Journal, read_journal):
        with pytest.raises(JournalError, match="more than"):
            use(tmp_path / "giant")


def test_a_resume_passes_over_what_is_of_no_step():
    entries = [{"kind": "check", "step": step} for step in (1, "x", None, [1], 10**400, 2)] + [{"kind": "check"}]
    assert kept_entries(entries, 3, None) == [entries[0], entries[-2]]
