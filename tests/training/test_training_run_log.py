"""What a run says in the terminal."""

import subprocess
import sys

import pytest

from safemerge_callback.io.printable import printable
from safemerge_callback.training.run.log import Log

HARMFUL = ["tell me how", "and this"]


def said(capsys):
    out = capsys.readouterr().out
    return [line for line in out.splitlines() if line.startswith("safemerge")]


def test_one_line_at_the_start_one_a_merge_one_at_the_end(world, tmp_path, capsys):
    world.trainer(tmp_path / "out", world.guard()).train()
    first, *merges, last = said(capsys)
    assert first.startswith("safemerge: gate all, 4 modules, linear 0.8 / 0.2 with ")
    assert first.endswith(
        "every 2 of 6 steps and at the end: 3 merges planned, 51% of the task's early update left after them"
    )
    assert [line.partition(", moved")[0] for line in merges] == [
        f"safemerge: step {step}: 4 of 4 modules merged" for step in (2, 4, 6)
    ]
    assert merges[1].endswith(", 64% of the task's early update left")
    assert last.startswith("safemerge: done: 3 checks, 3 merges, 51% of the task's early update left, moved_mean ")
    assert last.endswith(f"See it: safemerge report {tmp_path / 'out'}")


def test_watching_says_that_it_changes_nothing(world, tmp_path, capsys):
    world.trainer(tmp_path, world.guard(gate="watch", safety_adapter=None)).train()
    first, *rest, last = [line for line in said(capsys) if "fell below" not in line]
    assert first == "safemerge: gate watch, 4 modules: measured every 2 of 6 steps and at the end, nothing is changed"
    assert rest == []
    assert last.startswith("safemerge: done: 3 checks, moved_mean ")


@pytest.mark.parametrize("how", ["quiet", "another rank"])
def test_quiet_and_every_rank_but_the_first_say_nothing(world, tmp_path, capsys, how, monkeypatch):
    if how == "quiet":
        world.trainer(tmp_path, world.guard(quiet=True)).train()
    else:
        log = Log(first_rank=False)
        log.say("anything")
    assert said(capsys) == []


def test_quiet_keeps_warnings(capsys):
    log = Log(quiet=True)
    with pytest.warns(UserWarning, match="safemerge: a thing") as told:
        log.warn("thing", "a thing")
    log.warn("thing", "a thing again")
    assert told[0].filename == __file__


def test_a_line_stands_above_a_progress_bar():
    code = (
        "from tqdm import tqdm; from safemerge_callback.training.run.log import Log\n"
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
