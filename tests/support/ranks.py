"""One function in several processes, as a launcher starts them: `run_on(2, function, *words)`.

The function is named, not sent, so it stands in a module's top level; what it is given are texts. Whoever wants a
process group begins one in it (`dist.init_process_group("gloo")`), or lets the trainer do so; its end is ours.

The processes are forks of a server that has imported `tests.support.imports` and done nothing else: torch and
transformers take longer to import than most of what the ranks do.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch.distributed as dist

ROOT = Path(__file__).parents[2]
# How long the others may take to say their own part once one has failed: its loss may be what they wait for.
GRACE = 20.0
# What every rank's environment says, and the server's, which imports under it.
OURS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True)
class Rank:
    """One of the processes, and the file that takes all it prints."""

    process: BaseProcess
    output: Path

    def wait(self, seconds: float) -> int:
        """The exit code, once it ends."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"after {seconds:.0f} s it still runs:\n{self.said()}"
        return self.process.exitcode

    def said(self, last: int = 6000) -> str:
        """The end of what it has printed so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")[-last:]


def run_on(count: int, function: Callable[..., Any], *words: Any, seconds: float = 540) -> None:
    """Run a function in `count` processes; raise AssertionError with what they said unless all end well."""
    with started(count, function, *words) as ranks:
        finish(ranks, seconds)


@contextmanager
def started(count: int, function: Callable[..., Any], *words: Any) -> Iterator[list[Rank]]:
    """The processes while they run; whichever is left at the end is killed.

    One alone is told of no group, so that nothing is distributed in it.
    """
    command = [f"{function.__module__}:{function.__qualname__}", *map(str, words)]
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, _group(count) as told:
        ranks = [_start(command, told(rank), Path(folder) / f"{rank}.txt") for rank in range(count)]
        try:
            yield ranks
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()


def finish(ranks: list[Rank], seconds: float = 540) -> None:
    """Wait until all have ended; raise AssertionError with the end of what each said unless all ended well."""
    end = time.monotonic() + seconds
    while any(rank.process.exitcode is None for rank in ranks) and time.monotonic() < end:
        if any(rank.process.exitcode for rank in ranks):
            end = min(end, time.monotonic() + GRACE)
        time.sleep(0.05)
    codes = [rank.process.exitcode for rank in ranks]
    said = (f"\n--- rank {n} ({code}):\n{rank.said()}" for n, (rank, code) in enumerate(zip(ranks, codes, strict=True)))
    assert codes == [0] * len(ranks), f"exit codes {codes} (None: killed after {seconds:.0f} s)" + "".join(said)


def leave() -> NoReturn:
    """End one of a test's several processes, whose work is done and written, without the interpreter's own end.

    torch's DDP holds gloo's threads past `destroy_process_group` (pytorch#190489). One that frees a collective's
    tensors late asks for the interpreter's lock while it ends, and torch aborts the process; DeepSpeed's threads may do
    the same. An exception before this is raised as ever.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def _group(count: int) -> Iterator[Callable[[int], dict[str, str]]]:
    """What the environment tells each rank; the group meets at a store of ours, whose port nobody else can have."""
    if count == 1:
        yield lambda rank: {}
        return
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    yield lambda rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    del store


def _start(command: list[str], told: dict[str, str], output: Path) -> Rank:
    output.touch()
    process = _server().Process(target=_rank, args=(command, {**os.environ, **OURS, **told}, output))
    process.start()
    return Rank(process, output)


def _server() -> multiprocessing.context.ForkServerContext:
    """The server, which the first to ask starts: in our root, or it would import another copy of the package."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.imports"])
    with contextlib.chdir(ROOT), mock.patch.dict(os.environ, OURS):
        forkserver.ensure_running()
    return context


def _rank(command: list[str], environment: dict[str, str], output: Path) -> None:
    """What a fork runs: a process of its own environment, in our root, that prints to its file."""
    with output.open("wb") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    main(*command)


def main(name: str, *words: str) -> NoReturn:
    """Run the function that is named, and leave."""
    module, _, function = name.partition(":")
    run = getattr(importlib.import_module(module), function)
    gc.collect()
    gc.freeze()  # what is imported by now need not be walked over before and after each training
    run(*words)
    leave()
