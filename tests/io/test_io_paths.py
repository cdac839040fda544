"""A user's text as a path: a path, or one sentence."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.errors import ConfigError, JournalError
from safemerge_callback.io.paths import as_path


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ("~nosuchuser/x", "no such user"),
        ("a\0b", "can be no path"),
        ("\ud800", "can be no path"),
        ("x" * 300, "File name too long"),
        ("/" + "x/" * 5000, "File name too long"),
        ("", "an empty text"),
        (5, "give a path, as text"),
        (None, "give a path, as text"),
        (["a"], "give a path, as text"),
        (b"a", "give a path, as text"),
    ],
    ids=lambda value: str(value)[:12].encode("ascii", "replace").decode(),
)
def test_what_can_be_no_path_is_refused_with_the_reason(given_, words):
    with pytest.raises(ConfigError, match=f"^output .*{words}") as refused:
        as_path(given_, "output")
    assert len(str(refused.value)) < 300


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(JournalError, match="symbolic links"):
        as_path(tmp_path / "a" / "x", "journal", error=JournalError)


def test_paths_are_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/a b", "output") == tmp_path / "a b"
    assert as_path("not/there", "output") == Path("not/there")
    (tmp_path / "file").write_text("")
    assert as_path(tmp_path / "file" / "below", "output") == tmp_path / "file" / "below"
    assert as_path("org/name@main", "adapter") == Path("org/name@main")
    raw = os.fsdecode(b"\xff")
    assert as_path(raw, "output") == Path(raw)


@given(st.text())
def test_any_text_is_a_path_or_refused(text):
    try:
        found = as_path(text, "output")
    except ConfigError:
        return
    assert found == Path(text).expanduser()
