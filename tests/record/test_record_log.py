"""What a run says and writes as it goes."""

import subprocess
import sys

import pytest

from safemerge_callback.errors import JournalError
from safemerge_callback.io.printable import printable
from safemerge_callback.live.faults import Fault
from safemerge_callback.record import Journal, read_journal
from safemerge_callback.record.log import Log


def test_every_rank_but_the_first_says_nothing(capsys):
    Log(first_rank=False).say("anything")
    assert capsys.readouterr().out == ""


def test_quiet_keeps_warnings(capsys):
    log = Log(quiet=True)
    with pytest.warns(UserWarning, match="safemerge: a thing") as told:
        log.warn("thing", "a thing")
    log.warn("thing", "a thing again")
    assert told[0].filename == __file__


def test_a_line_stands_above_a_progress_bar():
    code = (
        "from tqdm import tqdm; from safemerge_callback.record.log import Log\n"
        "bar = tqdm(total=4, ascii=True)\nbar.update(1); Log().say('one'); bar.update(1); bar.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "safemerge: one\n"
    assert "safemerge" not in done.stderr


@pytest.mark.parametrize("fault", [RuntimeError("the kernel is gone"), AttributeError("no such stream")])
def test_a_stdout_of_another_make_may_fail_as_it_likes(monkeypatch, fault):
    class Stream:
        def write(self, text):
            raise fault

    monkeypatch.setattr(sys, "stdout", Stream())
    log = Log()
    log.say("one")
    monkeypatch.undo()
    assert log.quiet is True


@pytest.mark.parametrize("broken", ["closed", "full", "ascii"])
def test_a_terminal_that_fails_costs_the_line_and_not_the_training(monkeypatch, broken, tmp_path):
    class Full:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(28, "No space left on device")

        def flush(self):
            raise OSError(28, "No space left on device")

    stream = Full()
    if broken != "full":
        stream = (tmp_path / "out").open("w", encoding="ascii")
        if broken == "closed":
            stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    log = Log()
    log.say("módulo")
    log.say("again")
    monkeypatch.undo()
    if broken == "ascii":
        stream.close()
    assert log.quiet is True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("\r\n\t", "\\r\\n\\t"),
        ("\u202e\x9b", "\\u202e\\x9b"),
        ("módulo ‖V‖", "módulo ‖V‖"),
    ],
)
def test_nothing_that_moves_the_cursor_is_printed(capsys, text, shown):
    Log().say(text)
    assert capsys.readouterr().out == f"safemerge: {shown}\n"
    assert printable(text) == shown


def test_a_fault_is_noted_each_time_warned_of_once_and_told_elsewhere(tmp_path):
    told = []
    log = Log(journal=Journal(tmp_path / "j.jsonl"), alert=lambda *about, said: told.append((*about, said)))
    with pytest.warns(UserWarning, match="safemerge: it went wrong") as warned:
        log.fault(3, Fault("measure", "OSError: gone"), "it went wrong", alert="a check failed")
    assert [w.filename for w in warned] == [__file__]
    # A second warning would be an error here.
    log.fault(4, Fault("measure", "OSError: gone"), "it went wrong again")
    assert [(e["kind"], e["step"], e["where"]) for e in read_journal(tmp_path / "j.jsonl")] == [
        ("error", 3, "measure"),
        ("error", 4, "measure"),
    ]
    assert log.progress.journal_entries == 2
    assert told == [(3, "fault", "safemerge: a check failed", "measure, step 3: OSError: gone", True)]


def test_what_only_tells_costs_nothing_but_itself(tmp_path):
    log = Log(journal=Journal(tmp_path / "j.jsonl"))
    with pytest.warns(UserWarning, match="not all of step 5 could be told, training goes on: ZeroDivisionError"):
        log.tell(5, lambda: log.say(f"{1 / 0}"))
    assert [e["where"] for e in read_journal(tmp_path / "j.jsonl")] == ["report"]


def test_a_full_disk_is_warned_of_once_for_a_log_and_those_above_it(tmp_path, monkeypatch):
    below = Log(journal=Journal(tmp_path / "j.jsonl"))
    above = Log(beneath=below)

    def full(entry):
        raise JournalError("no space")

    monkeypatch.setattr(below.journal, "append", full)
    with pytest.warns(UserWarning, match="the journal lacks entries from step 1 on"):
        above.note({"kind": "probe", "step": 1})
    # A second warning would be an error here.
    below.note({"kind": "check", "step": 2})


def test_without_a_journal_nothing_is_kept():
    log = Log()
    log.note({"kind": "probe", "step": 1})
    assert log.progress.journal_entries == 0
