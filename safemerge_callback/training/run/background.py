"""A check that is measured beside the training; apart, since nothing else here knows of threads and streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from ...decision import Readings
from ...live import Writer
from ...live.faults import Fault, attempt
from ...live.ranks import rank
from ...ops import reduced_products
from ...subspace import Subspace
from .shares import RankShare, measure_share

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Pending:
    """A check of the weights of optimizer step `step` that is being measured; None where another rank measures it."""

    step: int
    answer: Future[Readings] | Fault | None

    def result(self) -> Readings | Fault:
        """Wait for the readings of this process."""
        if isinstance(self.answer, Future):
            return attempt("measure", self.answer.result)
        return self.answer or Fault("measure", "the first rank measures")


def begin(step: int, writer: Writer, subspace: Subspace, share: RankShare | None, gate: Mapping[str, Any]) -> Pending:
    """Copy the factors and start to measure the copies, on the first rank or, in shares, on each.

    `gate` as `measure_share` has it. Collective as `writer.gather` is. What goes wrong is kept, to be told when the
    result is asked for.
    """

    def start() -> Future[Readings] | None:
        factors = writer.gather()
        if share is None and rank() != 0:
            return None
        copies = {name: replace(f, A=f.A.detach().clone(), B=f.B.detach().clone()) for name, f in factors.items()}
        device = next(iter(copies.values())).A.device
        return beside(lambda: measure_share(copies, subspace, share, gate), device)

    return Pending(step, attempt("measure", start))


def beside(action: Callable[[], Answer], device: torch.device) -> Future[Answer]:
    """Start `action` on a thread; it sees what was asked of `device` so far, and nothing of it waits for `action`.

    It must draw no random numbers, call no collective, and write to nothing that the training reads. Raises
    RuntimeError where no thread can be started.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))

    def run() -> Answer:
        if stream is None:
            return action()
        with torch.cuda.stream(stream):
            try:
                return action()
            finally:
                # What was copied for it may be freed from now on.
                stream.synchronize()

    pool = ThreadPoolExecutor(1, thread_name_prefix="safemerge")
    try:
        return pool.submit(run)
    finally:
        pool.shutdown(wait=False)


def undisturbed() -> bool:
    """Return whether float32 products are in full precision already, so that measuring changes no setting.

    How a product is taken is a setting of the process, not of a thread. Where the training allows TF32, a check beside
    it would take that away from the training's own products for a while: such a check must not run beside it.
    """
    return not reduced_products()
