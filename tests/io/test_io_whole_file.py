import os
import subprocess
import sys

import pytest

from safemerge_callback.io.whole_file import settle, whole_file, whole_folder

OLD, NEW = {"a": "old a", "b": "old b", "other": "mine"}, {"a": "new a", "b": "new b"}


def folder_of(place, files):
    place.mkdir(parents=True)
    for name, text in files.items():
        (place / name).write_text(text)
    return place


def texts(place):
    return {path.name: path.read_text() for path in place.iterdir()}


def hidden(place):
    return sorted(path.name for path in place.parent.glob(".*"))


def write_file(place):
    with whole_file(place) as part:
        part.write_text("new")


def write_folder(place, into=False):
    with whole_folder(place, into=into) as part:
        folder_of(part, NEW)


def test_a_file_killed_at_any_point_is_the_old_or_the_new_and_the_next_write_cleans_up(tmp_path, kills):
    def fresh(k):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "file.txt").write_text("old")
        return tmp_path / str(k) / "file.txt"

    points = 0
    for place in kills(fresh, write_file):
        points += 1
        assert place.read_text() in ("old", "new")
        write_file(place)
        assert (place.read_text(), hidden(place)) == ("new", [])
    assert points >= 2


@pytest.mark.parametrize("into", [False, True])
def test_a_folder_killed_at_any_point_is_put_right_by_the_next_write_and_by_settle(tmp_path, kills, into):
    after = {**OLD, **NEW} if into else NEW
    points = 0
    for place in kills(lambda k: folder_of(tmp_path / str(k) / "out", OLD), lambda place: write_folder(place, into)):
        points += 1
        if into and place.is_dir():
            there = {name: text for name, text in texts(place).items() if name in NEW}
            assert there.items() <= NEW.items() or there.items() <= OLD.items(), "a mixture"
        settle(place)
        assert texts(place) in (OLD, after)
        write_folder(place, into)
        assert (texts(place), hidden(place)) == (after, [])
    assert points >= 4


def test_an_error_inside_leaves_what_was_there_and_nothing_beside_it(tmp_path):
    (tmp_path / "file").write_text("old")
    folder = folder_of(tmp_path / "out", OLD)

    def file_cut_off():
        with whole_file(tmp_path / "file") as part:
            part.write_text("half")
            raise KeyboardInterrupt

    def folder_cut_off():
        with whole_folder(folder) as part:
            folder_of(part, NEW)
            raise RuntimeError

    with pytest.raises(KeyboardInterrupt):
        file_cut_off()
    with pytest.raises(RuntimeError):
        folder_cut_off()
    assert ((tmp_path / "file").read_text(), texts(folder), hidden(folder)) == ("old", OLD, [])


def test_a_full_disk_leaves_what_was_there(tmp_path, full_disk):
    (tmp_path / "file").write_text("old")
    with full_disk(100), pytest.raises(OSError, match="File too large"), whole_file(tmp_path / "file") as part:
        part.write_text("x" * 1000)
    assert ((tmp_path / "file").read_text(), hidden(tmp_path / "file")) == ("old", [])


def test_what_another_living_process_writes_is_left_alone(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        theirs = tmp_path / f".file.{other.pid}.part"
        theirs.write_text("half")
        write_file(tmp_path / "file")
        assert theirs.exists()
        other.communicate(b"\n")
    write_file(tmp_path / "file")
    assert hidden(tmp_path / "file") == []


def test_a_link_is_followed_a_mode_kept_and_no_device_or_folder_replaced(tmp_path):
    real = tmp_path / "there" / "real"
    real.parent.mkdir()
    real.write_text("old")
    real.chmod(0o640)
    (tmp_path / "link").symlink_to(real)
    write_file(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (real.read_text(), real.stat().st_mode & 0o777) == ("new", 0o640)
    os.mkfifo(tmp_path / "pipe")
    for wrong in (tmp_path / "pipe", real.parent):
        with pytest.raises(OSError, match="no regular file"):
            write_file(wrong)
        assert not wrong.is_file()
