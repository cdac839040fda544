"""Where a run keeps its alignment matrices, and which of its modules each rank measures."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import distributed as dist

from ...adapters import LoraFactors
from ...decision import Readings, as_gate, measure
from ...decision.batches import batches
from ...live.faults import Fault
from ...live.ranks import all_or_none, everyones, many, rank
from ...subspace import Subspace
from ...subspace.memory import Memory, device_memory, host_memory
from ...subspace.placement import PlacementChoice, PlacementInputs, choose
from ..config.settings import SafeMergeConfig

logger = logging.getLogger(__name__)


def place(config: SafeMergeConfig, subspace: Subspace, factors: Mapping[str, LoraFactors]) -> PlacementChoice:
    """Choose where `subspace` keeps the matrices of these modules, tell the log, and let it keep them there.

    Collective, and the same on every rank, since ranks that share the work wait for each other. Raises ConfigError, on
    every rank, for a placement that has not the room.
    """
    choice = choose(config.placement, _setting(config, subspace, factors))
    if rank() == 0:
        logger.info("alignment matrices: %s", choice)
    subspace.place(choice.placement())
    return choice


class RankShare(NamedTuple):
    """The names of the modules that this rank measures, and of all modules in their order."""

    names: frozenset[str]
    order: tuple[str, ...]


def rank_share(choice: PlacementChoice, factors: Mapping[str, LoraFactors], subspace: Subspace) -> RankShare | None:
    """Return this rank's share of the modules; None where each rank measures all of them."""
    if not choice.sharded:
        return None
    return RankShare(frozenset(shares(factors, subspace, dist.get_world_size())[dist.get_rank()]), tuple(factors))


def shares(factors: Mapping[str, LoraFactors], subspace: Subspace, ranks: int) -> list[list[str]]:
    """Return the modules of each rank, balanced by the bytes of their matrices: the largest batch goes first.

    Batches stay whole, so that a module's cosine has the bits that it has where one process measures everything.
    Modules without a matrix cost nothing and stay with the first rank, which has others.
    """
    sizes = [(sum(stored_bytes(subspace, n) for n in batch.names), batch.names) for batch in batches(factors, subspace)]
    loads, parts = [0] * ranks, [list[str]() for _ in range(ranks)]
    for size, names in sorted(sizes, key=lambda pair: -pair[0]):
        rank = loads.index(min(loads)) if size else 0
        loads[rank] += size
        parts[rank].extend(names)
    return parts


def stored_bytes(subspace: Subspace, name: str) -> int:
    """Return the bytes of a module's tensors in the file; 0 for one that has none."""
    header = subspace.modules.get(name)
    return header.bytes(name) if header else 0


def measure_share(
    factors: Mapping[str, LoraFactors], subspace: Subspace, share: RankShare | None, gate: Mapping[str, Any]
) -> Readings:
    """Measure this rank's share of the modules, all of them for None. No collective. Raises as `measure`.

    `gate`: the knobs that `measure` takes, by which a compressed subspace need not be read exactly everywhere. A rank
    that sees a share of the modules cannot tell which of all have the lowest cosine, so there it is.
    """
    if share is None:
        return measure(factors, subspace, **gate)
    knobs = {name: value for name, value in gate.items() if name not in ("gate", "reference")}
    ranked = gate.get("gate") is not None and as_gate(gate["gate"], knobs).ranked
    factors = {n: f for n, f in factors.items() if n in share.names}
    return measure(factors, subspace, **({"reference": gate.get("reference")} if ranked else gate))


def measure_once(
    factors: Mapping[str, LoraFactors], subspace: Subspace, share: RankShare | None, gate: Mapping[str, Any]
) -> Readings | Fault:
    """Measure as `measure_share`; without shares on the first rank alone, whose readings count: a Fault on others."""
    if share is None and rank() != 0:
        return Fault("measure", "the first rank measures")
    return measure_share(factors, subspace, share, gate)


def measure_together(
    factors: Mapping[str, LoraFactors], subspace: Subspace, share: RankShare | None, gate: Mapping[str, Any]
) -> Readings:
    """Measure all modules, each rank its share. Collective where there are shares; raises as `measure`, on each."""
    if share is None:
        return measure_share(factors, subspace, None, gate)
    return _in_order(share, everyones(all_or_none(lambda: measure_share(factors, subspace, share, gate))))


def join(readings: Readings | Fault, share: RankShare | None) -> Readings | Fault:
    """Return the readings of all ranks in order, or the first rank's fault; `readings` where there are no shares.

    Collective where there are shares; only numbers travel, not matrices.
    """
    if share is None:
        return readings
    readings_of_ranks = everyones(readings)
    for number, answer in enumerate(readings_of_ranks):
        if isinstance(answer, Fault):
            return replace(answer, error=f"{answer.error} (on rank {number} of {len(readings_of_ranks)})")
    return _in_order(share, [answer for answer in readings_of_ranks if not isinstance(answer, Fault)])


def _in_order(share: RankShare, readings_of_ranks: Sequence[Readings]) -> Readings:
    readings = {name: reading for answer in readings_of_ranks for name, reading in answer.items()}
    return Readings(readings[name] for name in share.order)


def _setting(config: SafeMergeConfig, subspace: Subspace, factors: Mapping[str, LoraFactors]) -> PlacementInputs:
    """Bytes are the same on every rank; of memory, what the rank with the least has."""
    device = next(iter(factors.values())).A.device
    ranks = dist.get_world_size() if many() else 1
    loads = [sum(stored_bytes(subspace, name) for name in part) for part in shares(factors, subspace, ranks)]
    gpu = device_memory(device) if device.type == "cuda" else None
    near = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    host = Memory(*(count // max(1, near) for count in host_memory()))
    seen = everyones((gpu, host))
    gpus = [memory for memory, _ in seen if memory is not None]
    return PlacementInputs(
        whole=sum(loads),
        share=max(loads),
        ranks=ranks,
        again=config.every > 0,
        device=device.type,
        gpu=min(gpus) if len(gpus) == len(seen) else None,
        host=min(memory for _, memory in seen),
    )
