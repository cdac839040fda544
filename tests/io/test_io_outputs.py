"""Wherever a file is written: what must stay is refused as an output, and is as it was."""

import os
import stat
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from safemerge_callback.cli import app
from safemerge_callback.errors import ConfigError, SafeMergeError
from safemerge_callback.io.outputs import PICTURE, FileKind, free_output, new_output, same_place
from safemerge_callback.offline.sweep.table import Sweep
from safemerge_callback.reports.page import write_page
from safemerge_callback.reports.plots import write_report
from safemerge_callback.reports.saving import save_figure
from safemerge_callback.reports.sweep_plot import check_picture, write_plot
from safemerge_callback.subspace import Subspace, build_subspace, compress_subspace

NOTES = FileKind("a note", lambda head: head.startswith(b"note"))


def checkpoint(folder, shift=0.0):
    folder.mkdir()
    torch.manual_seed(0)
    save_file({"model.layers.0.q_proj.weight": torch.randn(8, 8) + shift}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def parts(tmp_path):
    """Two checkpoints, a subspace of theirs, and one file of each kind that somebody may lose."""
    aligned, unaligned = checkpoint(tmp_path / "al"), checkpoint(tmp_path / "un", 1.0)
    build_subspace(tmp_path / "s", aligned=aligned, unaligned=unaligned, progress=False)
    (tmp_path / "page").write_text("<!doctype html><title>my own page</title>")
    (tmp_path / "journal").write_text('{"kind": "start", "step": 0}\n')
    (tmp_path / "text").write_text("a thesis,\nall of it")
    return tmp_path


def build(parts, output):
    return build_subspace(output, aligned=parts / "al", unaligned=parts / "un", progress=False)


# Where it does not matter what is written: the output is refused before.
ANY: Any = None
WRITERS = {
    "build": (build, ""),
    "compress": (lambda parts, output: compress_subspace(parts / "s", output, progress=False), ""),
    "table": (lambda _, output: Sweep([], ANY).write_csv(output), ""),
    "sweep plot": (lambda _, output: write_plot(Sweep([], ANY), output), ".png"),
    "plot": (lambda _, output: save_figure(SimpleNamespace(savefig=lambda *a, **k: None), output), ".pdf"),
    "page": (lambda _, output: write_page(ANY, output), ".html"),
    "report": (lambda _, output: write_report(ANY, output), ".html"),
}


@pytest.mark.parametrize("who", WRITERS)
@pytest.mark.parametrize("victim", ["al/model.safetensors", "al/config.json", "page", "journal", "a link", "hard link"])
def test_no_writer_replaces_a_file_of_another_kind(parts, who, victim):
    write, ending = WRITERS[who]
    target = parts / (("al/model.safetensors" if "link" in victim else victim) + ending)
    if ending and "link" not in victim:
        os.link(parts / victim, target)
    if victim == "a link":
        target = parts / f"link{ending}"
        target.symlink_to(parts / "al" / "model.safetensors")
    if victim == "hard link":
        target = parts / f"hard{ending}"
        os.link(parts / "al" / "model.safetensors", target)
    before = target.read_bytes()
    with pytest.raises(SafeMergeError, match=r"is there and is not .*give another name"):
        write(parts, target)
    assert target.read_bytes() == before
    assert not list(parts.rglob(".*"))


@pytest.mark.parametrize("who", WRITERS)
@pytest.mark.parametrize("there", ["folder", "pipe", "device"])
def test_no_writer_replaces_what_is_no_file(parts, who, there):
    write, ending = WRITERS[who]
    target = parts / f"there{ending}"
    if there == "device" and os.geteuid():
        pytest.skip("only root makes devices")
    if there == "folder" and who == "report":
        pytest.skip("the page is written into a folder, under a name of its own")
    make = {"folder": target.mkdir, "pipe": lambda: os.mkfifo(target)}
    make.get(there, lambda: os.mknod(target, 0o666 | stat.S_IFCHR, os.makedev(1, 7)))()
    mode = target.lstat().st_mode
    with pytest.raises(SafeMergeError, match=r"a folder|no regular file"):
        write(parts, target)
    assert target.lstat().st_mode == mode


def test_a_source_of_the_same_kind_is_refused_by_any_name(parts):
    (parts / "link").symlink_to(parts / "s")
    os.link(parts / "s", parts / "hard")
    for name in ("s", "link", "hard", "al/../s"):
        with pytest.raises(SafeMergeError, match="is one of the inputs"):
            compress_subspace(parts / "s", parts / name, progress=False)
    Subspace.load(parts / "s").verify()


def test_what_is_of_its_kind_or_empty_is_replaced(parts):
    (parts / "empty").touch()
    for name in ("s", "empty", "new/below"):
        build(parts, parts / name)
        Subspace.load(parts / name).verify()
    (parts / "table.csv").write_text("x,y\n1,2\n")
    Sweep([], []).write_csv(parts / "table.csv")
    assert (parts / "table.csv").read_text().startswith("gate,knob,")


def test_sweep_asks_before_it_measures(parts):
    done = CliRunner().invoke(app, ["sweep", "nowhere", "-s", str(parts / "s"), "-o", str(parts / "s")])
    assert done.exit_code == 2
    assert "is there and is not a CSV table" in done.stderr
    os.link(parts / "s", parts / "s.png")
    with pytest.raises(ConfigError, match="is not a picture"):
        check_picture(parts / "s.png")


def test_eval_asks_before_it_loads(parts):
    words = ["eval", "nowhere", "--probes", "", "--tasks", "x"]
    for more, told in (
        (["-o", parts / "s"], "is not a file of figures"),
        (["--responses", parts / "journal"], "is not a file of responses"),
        (["-o", parts / "new", "--responses", parts / "al" / ".." / "new"], "give two files"),
        (["-o", parts / "al"], "is a folder"),
    ):
        done = CliRunner().invoke(app, [*words, *map(str, more)])
        assert done.exit_code == 2
        assert told in done.stderr


ROWS = (
    '{"prompt": "a", "response": "No, I cannot.", "kind": "harm"}\n'
    '{"prompt": "b", "response": "Yes.", "kind": "benign"}\n'
)
# Every verb that loads a model or an adapter and writes what came of it: its words before the output.
LAST = [
    ["gate", "no/model", "--min-refused", "0.5", "--card"],
    ["gate", "no/model", "--min-refused", "0.5", "--junit"],
    ["harvest", "no/model", "-o"],
    ["select", "rows.jsonl", "--aligned", "no/model", "--unaligned", "no/model", "--n", "1", "-o"],
    ["select", "rows.jsonl", "--drop", "--aligned", "no/model", "--unaligned", "no/model", "-o"],
    ["select", "rows.jsonl", "--drop", "--aligned", "no/model", "--unaligned", "no/model", "-o", "new", "--dropped"],
    ["eval", "no/model", "-o"],
    ["eval", "no/model", "--responses"],
    ["sweep", "no/model", "-s", "s", "-o"],
    ["sweep", "no/model", "-s", "s", "--plot"],
    ["search", "no/model", "-s", "s", "--task-rows", "rows.jsonl", "--safety-rows", "rows.jsonl", "-o"],
    [
        "search",
        "no/model",
        "-s",
        "s",
        "--task-rows",
        "rows.jsonl",
        "--safety-rows",
        "rows.jsonl",
        "-o",
        "new",
        "--plot",
    ],
    ["merge", "no/model", "-s", "s", "-o"],
    ["bake", "no/model", "--base", "al", "-o"],
    ["build", "--aligned", "al", "--unaligned", "un", "-o"],
    ["compress", "s", "-o"],
]


@pytest.mark.parametrize("words", LAST, ids=lambda words: f"{words[0]} {words[-1]}")
def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_loaded(parts, monkeypatch, words):
    monkeypatch.chdir(parts)
    (parts / "rows.jsonl").write_text(ROWS)
    # No folder, also for who may write everywhere.
    done = CliRunner().invoke(app, [*words, "text/new.png"])
    assert done.exit_code == 2
    assert "text/new.png' cannot be written: Not a directory" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(parts.rglob(".*"))


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    with suppress(ZeroDivisionError), new_output(tmp_path / "a" / "b", "note", NOTES) as part:
        part.write_text("note")
        _ = 1 / 0
    assert [path.name for path in (tmp_path / "a").iterdir()] == []
    with new_output(tmp_path / "a" / "b", "note", NOTES) as part:
        part.write_text("note: done")
    assert (tmp_path / "a" / "b").read_text() == "note: done"
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ConfigError, match=r"^note .* cannot be written"),
        new_output(tmp_path / "file" / "b", "note", NOTES),
    ):
        pass
    for bad in ("", ".", "/", "~nosuchuser/x", "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"^note "):
            free_output(bad, "note", NOTES)


def test_places_are_compared_by_what_they_are(tmp_path):
    (tmp_path / "a").write_text("")
    (tmp_path / "b").symlink_to("a")
    assert same_place(tmp_path / "a", str(tmp_path / "b"))
    for one, other in (("a", "c"), ("c", "c"), ("a", "."), ("a", None), ("a", 5), ("a", "\0")):
        assert not same_place(tmp_path / one, tmp_path / other if isinstance(other, str) and other != "\0" else other)
    assert PICTURE.begins(b"\x89PNG\r\n")
    assert not PICTURE.begins(Path(__file__).read_bytes())
