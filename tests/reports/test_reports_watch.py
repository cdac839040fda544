"""The terminal watch, on files that grow, are cut, and are not there yet."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from safemerge_callback.errors import JournalError
from safemerge_callback.reports import History, read_history, watch_run
from safemerge_callback.reports.watch import Tail, frame

PLACE = "safemerge.jsonl"


@pytest.fixture
def lines(example):
    return example.read_bytes().splitlines(keepends=True)


def text_of(history, path, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(frame(history, path))
    return console.file.getvalue()


def shown(width=400):
    return Console(file=io.StringIO(), width=width, color_system=None, force_terminal=True)


def test_it_reads_on_from_where_it_was_and_a_line_cut_short_waits(lines, tmp_path, example):
    tail = Tail(tmp_path)
    assert not tail.read()
    assert "no journal there yet; waiting" in text_of(tail.history, tail.path).replace("\n", "")
    path = tmp_path / PLACE
    with path.open("ab", buffering=0) as file:
        for line in lines:
            file.write(line[:40])
            before = (dict(tail.history.cells), len(tail.history.probes))
            tail.read()
            assert (tail.history.cells, len(tail.history.probes)) == before
            file.write(line[40:])
            assert tail.read()
            assert not tail.read()
    whole = read_history(example)
    tail.history.title = whole.title
    assert {k: v for k, v in vars(tail.history).items() if k in whole.__dataclass_fields__} == {
        k: v for k, v in vars(whole).items() if k in whole.__dataclass_fields__
    }


def test_a_journal_cut_back_by_a_resume_is_read_again(lines, tmp_path):
    path = tmp_path / PLACE
    path.write_bytes(b"".join(lines))
    tail = Tail(path)
    tail.read()
    path.write_bytes(b"".join(lines[:4]))
    assert tail.read()
    assert tail.history.steps == [10]
    replaced = tmp_path / "part"
    replaced.write_bytes(b"".join(lines))
    replaced.replace(path)
    assert tail.read()
    assert len(tail.history.steps) == 12


def test_a_frame_holds_the_last_check_the_ten_worst_merges_and_the_probe(example):
    history = read_history(example)
    text = text_of(history, example)
    last = history.steps[-1]
    worst = sorted(history.modules, key=lambda name: history.cells[name, last].moved)[:10]
    rows = [line.split() for line in text.splitlines() if "_proj " in line]
    assert len(rows) == 10
    assert [row[1] for row in rows] == [name.split(".")[1] for name in worst]
    assert [row[3] for row in rows] == [f"{history.cells[name, last].moved:+.2f}" for name in worst]
    assert [row[4] for row in rows] == [f"{history.cells[name, last].cosine:.4f}" for name in worst]
    mean = sum(history.cells[name, last].moved for name in history.modules) / len(history.modules)
    assert f"moved {mean:+.2f} on average" in text
    assert all(len(row[2]) == 12 and set(row[2]) <= set("▁▂▃▄▅▆▇█") for row in rows)
    assert f"ended at step {last}, 12 checks, gate threshold 0.35" in text
    assert f"{len(history.merges)} merges in {len(history.merged_modules)} modules" in text
    for measure in ("advbench_refused", "benign_refused", "pubmedqa_accuracy", "eval_loss"):
        assert measure in text
    assert "n = 64" in text
    assert max(map(len, text.splitlines())) <= 80


def test_measures_of_any_size_are_in_their_unit(scales):
    text = text_of(read_history(scales), scales, width=100)
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert re.search(r"translation +[▁▂▃▄▅▆▇█]+ [\d.]+ BLEU, n = 200", rows["translation"])
    # its own lowest to its own highest, not from 0 to 1
    assert {"▁", "█"} <= set(rows["translation"])
    assert {"▁", "█"} <= set(rows["reward"])
    assert "%" not in rows["called_a_share"]
    assert "%" in rows["pubmedqa_accuracy"]


def test_rules_faults_and_odd_modules_are_told(lines, tmp_path):
    entries = [json.loads(line) for line in lines[:-1]]
    last = [entry for entry in entries if entry["kind"] == "check"][-1]
    name = last["modules"][0]["name"]
    last["modules"][0]["cosine"] = None
    last["modules"][1]["name"] = "layers.0.\x1b[31mred"
    last["modules"][1]["cosine"] = 0.01
    merged = [entry for entry in entries if entry["kind"] == "merge"][-1]
    entries += [
        {
            "kind": "rollback",
            "step": 120,
            "modules": [m["name"] for m in merged["modules"]],
            "reason": "eval loss rose",
        },
        {"kind": "trigger", "step": 120, "reason": "refusals fell"},
        {"kind": "error", "step": 120, "where": "measure", "error": "boom"},
    ]
    path = tmp_path / PLACE
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    text = text_of(read_history(path), path, width=100)
    assert "\x1b" not in text
    assert "not finite" in next(line for line in text.splitlines() if name.split(".")[-1] + " 0 " in line)
    assert "rollback at step 120: eval loss rose" in text
    assert "trigger at step 120: refusals fell" in text
    assert "fault: step 120, measure: boom" in text
    assert f"{len(merged['modules'])} taken back" in text


def test_once_prints_one_frame(example, tmp_path):
    console = shown(80)
    history = watch_run(example.parent, once=True, console=console, sleep=pytest.fail)
    assert len(history.steps) == 12
    assert console.file.getvalue().count("ended at step") == 1
    with pytest.raises(JournalError, match="leave out --once to wait"):
        watch_run(tmp_path / "nowhere", once=True)


def test_it_waits_follows_and_leaves_when_the_run_ends(lines, tmp_path):
    waiting = iter([b"", lines[0], lines[1], lines[2], b"".join(lines[3:])])
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        (tmp_path / "run").mkdir(exist_ok=True)
        with (tmp_path / "run" / PLACE).open("ab") as file:
            file.write(next(waiting))

    console = shown()
    history = watch_run(tmp_path / "run", every=0.25, console=console, sleep=sleep)
    assert history.end["kind"] == "end"
    assert naps == [0.25] * 5
    said = console.file.getvalue()
    assert said.index("no journal there yet") < said.index("no check yet") < said.index("last check at step 10")
    assert said.rindex("ended at step 120") > said.rindex("last check at step")


def test_a_line_that_is_none_of_ours_is_named(lines, tmp_path):
    (tmp_path / PLACE).write_bytes(lines[0] + b"{}\n")
    with pytest.raises(JournalError, match="line 2: not an entry of ours"):
        watch_run(tmp_path, once=True)
    (tmp_path / PLACE).write_bytes(lines[0] + b"nonsense\n")
    with pytest.raises(JournalError, match="line 2: not JSON"):
        watch_run(tmp_path, once=True)
    (tmp_path / PLACE).write_bytes(lines[0])
    assert watch_run(tmp_path, once=True).cells == {}


@pytest.mark.skipif(os.name != "posix", reason="signals as a terminal sends them")
def test_ctrl_c_leaves_a_real_watch_cleanly(lines, tmp_path):
    (tmp_path / PLACE).write_bytes(b"".join(lines[:3]))
    command = [sys.executable, "-m", "safemerge_callback.cli", "watch", str(tmp_path), "--every", "0.1"]
    # a shell that runs the tests in the background has them ignore SIGINT, and a child inherits that
    told = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        signal.signal(signal.SIGINT, told)
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not _reads(watching.pid):
                time.sleep(0.1)
            watching.send_signal(signal.SIGINT)
            out, err = watching.communicate(timeout=60)
        finally:
            watching.kill()
    assert watching.returncode == 0, err
    assert err == ""
    assert "last check at step 10" in out


def _reads(pid):
    """Whether the process sleeps between two looks: by then its handler for Ctrl-C is in place."""
    try:
        with open(f"/proc/{pid}/wchan") as file:  # noqa: PTH123 - no path of ours
            return "nanosleep" in file.read()
    except OSError:
        time.sleep(5)
        return True


def test_a_torn_line_is_passed_over_with_a_word_by_watch_and_report(lines, tmp_path, example):
    (tmp_path / PLACE).write_bytes(lines[0] + lines[1][:50] + lines[1] + lines[2][:60] + b"\n" + b"".join(lines[2:]))
    with pytest.warns(UserWarning, match="2 lines, first line 2, were cut off") as told:
        seen = watch_run(tmp_path, once=True, console=shown())
    with pytest.warns(UserWarning, match="2 lines, first line 2, were cut off"):
        reported = read_history(tmp_path)
    assert len(told) == 1
    assert seen.cells == reported.cells == read_history(example).cells


def test_a_run_without_checks_shows_what_is_replayed(replayed, both):
    text = text_of(read_history(replayed), replayed / "safemerge.jsonl", width=100)
    assert text.splitlines()[0] == "out  ended at step 12"
    assert "replay until step 12: in 12 steps, 24 rows, weight 2, interval 1, " in text
    last = read_history(replayed).terms["replay"][12]
    assert re.search(rf"^loss +[▁-█]{{12}} {last.loss:.3g}$", text, re.M)
    assert re.search(rf"^loss, harm +[▁-█ ]{{12}} {last.figures['loss_harm']:.3g}$", text, re.M)
    assert re.search(rf"^cosine +[▁-█]{{12}} {last.cosine:.3g}$", text, re.M)
    assert "nothing merged" not in text
    text = text_of(read_history(both), both, width=100)
    assert "12 checks, gate threshold 0.35" in text
    assert "replay until step 120: in 120 steps, 240 rows, weight 0.5, interval 1, 6.0 s" in text
    assert "probe at step 120" in text


def test_a_run_that_only_has_faults_shows_them():
    history = History("run", starts=[{"step": 0}], faults=["step 1, replay: its loss is nan"])
    assert "fault: step 1, replay: its loss is nan" in text_of(history, Path("run"), width=100)
