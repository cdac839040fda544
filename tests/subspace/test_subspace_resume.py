"""A build that is killed, or whose disk fills up, and what the next one makes of it."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safemerge_callback.errors import SubspaceError
from safemerge_callback.subspace import build_subspace, compress_subspace
from safemerge_callback.subspace.digests import digest_of
from safemerge_callback.subspace.resume import sole_writer
from safemerge_callback.subspace.stream import SafetensorsStream
from tests.support.ranks import run_on, started

MODULES = 12


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    for name in ("aligned", "unaligned"):
        (tmp_path / name).mkdir()
        tensors = {f"model.layers.{i}.a.weight": torch.randn(160 + i, 256) for i in range(MODULES - 2)}
        tensors["model.layers.20.b.weight"] = torch.arange(99 * 3.0).reshape(99, 3).bfloat16()  # equal in both
        low = torch.randn(100, 3) @ torch.randn(3, 200) if name == "aligned" else torch.zeros(100, 200)
        tensors["model.layers.3.low.weight"] = low
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


def build(folder, output="v", **knobs):
    knobs = {"aligned": folder / "aligned", "unaligned": folder / "unaligned", "progress": False, **knobs}
    return build_subspace(folder / output, device="cpu", **knobs)


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def interrupted(folder, after):
    """A build that Ctrl-C ends after some modules, or before the file is put in its place."""
    commit, left = SafetensorsStream.commit, iter(range(after))

    def commit_or_stop(stream, record):
        if next(left, None) is None:
            raise KeyboardInterrupt
        commit(stream, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsStream, "commit", commit_or_stop)
        patch.setattr(SafetensorsStream, "finish", commit_or_stop)
        with pytest.raises(KeyboardInterrupt):
            build(folder)


def kill_until_done(folder, seed):
    """What a process runs in which torch has started no thread: builds in forks, each killed after a while."""
    folder, draw, kills = Path(folder), random.Random(int(seed)), 0
    while True:
        child = os.fork()
        if child == 0:
            build(folder)
            os._exit(0)
        if kills < 8:
            time.sleep(draw.uniform(0, 0.25))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert not (folder / "v").exists()
        kills += 1
    assert kills > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_points_the_file_is_that_of_an_unbroken_build(folder, seed):
    build(folder, "unbroken")
    run_on(1, kill_until_done, folder, seed)
    assert (folder / "v").read_bytes() == (folder / "unbroken").read_bytes()
    assert hidden(folder) == []


@pytest.mark.parametrize("after", [0, 1, 7, MODULES])
def test_it_goes_on_after_the_last_finished_module(folder, after, caplog):
    build(folder, "unbroken")
    interrupted(folder, after)
    assert hidden(folder) == ([".v.partial", ".v.partial.steps"] if after else [])
    caplog.set_level("INFO")
    caplog.clear()
    build(folder)
    assert caplog.messages == ([f"{folder / 'v'}: going on after {after} finished steps."] if after else [])
    assert (folder / "v").read_bytes() == (folder / "unbroken").read_bytes()
    assert hidden(folder) == []


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def cut(path, fraction):
    os.truncate(path, int(path.stat().st_size * fraction))


@pytest.mark.parametrize(
    "damage",
    [
        lambda partial, steps: flip(partial, partial.stat().st_size // 2),
        lambda partial, steps: cut(partial, 0.9),
        lambda partial, steps: cut(partial, 0.0),
        lambda partial, steps: cut(steps, 0.7),
        lambda partial, steps: cut(steps, 0.0),
        lambda partial, steps: steps.unlink(),
        lambda partial, steps: partial.unlink(),
        lambda partial, steps: steps.write_text(steps.read_text() + '{"record": 1}\n'),
        lambda partial, steps: partial.write_bytes(partial.read_bytes() + bytes(4_000_000)),
    ],
)
def test_what_a_power_cut_does_to_the_kept_part_does_not_reach_the_file(folder, damage):
    build(folder, "unbroken")
    interrupted(folder, 8)
    damage(folder / ".v.partial", folder / ".v.partial.steps")
    build(folder)
    assert (folder / "v").read_bytes() == (folder / "unbroken").read_bytes()


def test_other_sources_or_targets_begin_anew_and_say_so(folder, caplog):
    build(folder, "unbroken", target_modules=["a"])
    interrupted(folder, 5)
    build(folder, target_modules=["a"])
    assert "is begun anew" in caplog.text
    assert (folder / "v").read_bytes() == (folder / "unbroken").read_bytes()
    (folder / "v").unlink()
    interrupted(folder, 5)
    # Copies: what was loaded may be the file itself, mapped.
    doubled = {name: tensor * 2 for name, tensor in load_file(folder / "aligned" / "model.safetensors").items()}
    save_file(doubled, folder / "aligned" / "model.safetensors")
    caplog.clear()
    V = build(folder).stack(["layers.0.a"])[0]
    assert "is begun anew" in caplog.text
    other = load_file(folder / "unaligned" / "model.safetensors")["model.layers.0.a.weight"]
    assert torch.equal(V, doubled["model.layers.0.a.weight"] - other)


def test_a_second_writer_is_refused_and_the_first_goes_on(folder):
    with sole_writer(folder / "v"):
        with pytest.raises(SubspaceError, match="is being written by another process; wait for it"):
            build(folder)
        assert hidden(folder) == [".v.lock"]
    build(folder)
    assert hidden(folder) == []


def hold(path):
    """What a process runs that is killed while it writes."""
    with sole_writer(Path(path)):
        print("writing", flush=True)
        time.sleep(60)


def test_the_lock_of_a_killed_writer_is_void(folder):
    with started(1, hold, folder / "v") as (writer,):
        while not writer.said():
            assert writer.process.is_alive()
            time.sleep(0.01)
        with pytest.raises(SubspaceError, match="another process"):
            build(folder)
    assert hidden(folder) == [".v.lock"]
    build(folder)
    assert hidden(folder) == []


@pytest.mark.parametrize("limit", [100, 40_000, 700_000])
def test_a_full_disk_leaves_the_old_file_and_the_next_build_goes_on(folder, full_disk, limit):
    build(folder, "unbroken")
    (folder / "v").write_text("old safemerge.subspace")
    kept = limit > 300_000
    with full_disk(limit), pytest.raises(SubspaceError) as refused:
        build(folder)
    assert f"cannot write {str(folder / 'v')!r}: File too large." in str(refused.value)
    assert ("finished steps are kept" if kept else "Nothing was left there") in str(refused.value)
    assert hidden(folder) == ([".v.partial", ".v.partial.steps"] if kept else [])
    assert (folder / "v").read_text() == "old safemerge.subspace"
    build(folder)
    assert (folder / "v").read_bytes() == (folder / "unbroken").read_bytes()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(folder):
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(SubspaceError, match=r"No space left on device\. \d finished steps are kept beside it"):
            build(folder, "disk/v")
        assert not (disk / "v").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        build(folder, "disk/v")
        build(folder, "unbroken")
        assert (disk / "v").read_bytes() == (folder / "unbroken").read_bytes()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_weights_that_cannot_be_used_keep_nothing(folder):
    path = folder / "unaligned" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.9.a.weight"][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(SubspaceError, match=r"'unaligned': module 'layers\.9\.a' has 1 values that are not finite"):
        build(folder)
    assert hidden(folder) == []


def test_a_source_that_fails_to_be_read_keeps_what_is_done(folder, caplog):
    build(folder, "unbroken")
    source, away = folder / "unaligned" / "model.safetensors", folder / "unmounted"
    commit = SafetensorsStream.commit

    def commit_and_unmount(stream, record):
        commit(stream, record)
        if len(stream.records) == 4:
            source.rename(away)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsStream, "commit", commit_and_unmount)
        with pytest.raises(SubspaceError, match=r"model\.safetensors' cannot be read: no such file"):
            build(folder)
    # The one after was being read ahead.
    assert "5 finished steps are kept; run the same again" in caplog.text or "4 finished steps" in caplog.text
    away.rename(source)
    build(folder)
    assert (folder / "v").read_bytes() == (folder / "unbroken").read_bytes()


def test_checksums_are_of_the_stored_bytes_and_see_one_changed_bit(folder):
    subspace = build(folder)
    tensors = load_file(folder / "v")
    for name, module in subspace.modules.items():
        assert set(module.checksums) == set(module.tensors(name))
        assert module.checksums == {key: digest_of(tensors[key]) for key in module.checksums}
    probes = ("probes", "probe_positions")
    assert subspace.header.checksums == {key: digest_of(tensors[key]) for key in probes}
    key = "layers.0.a.V"
    before = digest_of(tensors[key])
    tensors[key].view(torch.int32)[3, 4] ^= 1
    assert digest_of(tensors[key]) != before


def test_the_step_log_holds_no_machine_path(folder):
    interrupted(folder, 3)
    lines = [json.loads(line) for line in (folder / ".v.partial.steps").read_text().splitlines()]
    assert len(lines) == 4
    assert str(folder) not in json.dumps(lines)


@pytest.mark.parametrize("verb", ["build", "compress"])
def test_killed_at_any_change_to_the_disk_a_rerun_ends_whole_and_leaves_nothing_hidden(folder, tmp_path, kills, verb):
    exact = tmp_path / "exact" / "v.safetensors"
    build_subspace(exact, aligned=folder / "aligned", unaligned=folder / "unaligned", progress=False)

    def write(place):
        if verb == "build":
            build_subspace(place, aligned=folder / "aligned", unaligned=folder / "unaligned", progress=False)
        else:
            compress_subspace(place.parent / "v.safetensors", place, progress=False)

    def fresh(k):
        (tmp_path / str(k)).mkdir()
        shutil.copyfile(exact, tmp_path / str(k) / "v.safetensors")
        return tmp_path / str(k) / "new.safetensors"

    write(fresh(0))
    wanted, points = (tmp_path / "0" / "new.safetensors").read_bytes(), 0
    for place in kills(fresh, write):
        points += 1
        assert not place.exists() or place.read_bytes() == wanted
        write(place)
        assert place.read_bytes() == wanted
        assert [*place.parent.glob(".*")] == []
    assert points >= 3
