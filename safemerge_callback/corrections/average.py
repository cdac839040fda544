"""The exponential moving average of a run's own updates, at low rank: what method `ema` goes to, and its state."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapters import Adapter, LoraFactors
from ..adapters.factor_file import read_pairs, write_pairs
from ..adapters.host import to_host
from ..decision.batches import stacked
from ..errors import AdapterError
from ..io.file_faults import reading_fault
from ..live.faults import attempt
from ..live.ranks import all_or_none, from_first, rank
from ..ops import LowRank, full_precision, truncate, weighted_sum
from .protocol import RunPoint

AVERAGE_FILE = "safemerge_average.safetensors"
# The average holds this many times the live rank. A sum of updates of many steps has more directions than one of them.
ROOM = 4


@dataclass
class Average:
    """E = Σ d^(n-i)·(1 - d)·ΔWᵢ over the n updates it has followed, before which it was 0, the aligned model.

    `decay` is d, in [0, 1). `pairs`: module -> factors of E in the live adapter's units, (4r, d_in) and (d_out, 4r),
    float32 on the host. `residual`: the largest share of a module's average that one truncation to that rank has
    dropped. The average is of the products B·A, so it does not see the gauge: factors averaged by themselves would
    multiply to something else.
    """

    decay: float
    pairs: dict[str, LowRank] = field(default_factory=dict)
    followed: int = 0
    residual: float = 0.0

    @full_precision()
    def follow(self, factors: Mapping[str, LoraFactors]) -> None:
        """Take the present updates in: E <- d·E + (1 - d)·ΔW. Computed where the factors live."""
        pairs, dropped = {}, []
        for name, module in factors.items():
            device = module.A.device
            update = stacked([module.update], device)
            before = self.pairs.get(name)
            terms, weights = [update], [1.0 - self.decay]
            if before is not None:
                terms, weights = [stacked([before], device), update], [self.decay, *weights]
            total, residual = truncate(weighted_sum(terms, weights), ROOM * module.rank)
            pairs[name] = LowRank(total.A[0].float(), total.B[0].float())
            dropped.append(residual)
        tensors = iter(to_host([tensor for pair in pairs.values() for tensor in pair]))
        self.pairs = {name: LowRank(next(tensors), next(tensors)) for name in pairs}
        self.followed += 1
        # Residuals of several devices meet on the first, so that the host waits once.
        lost = torch.cat([residual.to(dropped[0].device) for residual in dropped]).tolist() if dropped else []
        self.residual = max(self.residual, *lost, 0.0)

    def adapter(self, factors: Mapping[str, LoraFactors]) -> Adapter:
        """Return the average as an adapter of the modules `factors`, with their scalings; the live one if none yet."""
        kept = {}
        for name, module in factors.items():
            A, B = self.pairs.get(name, module.update)
            kept[name] = LoraFactors(name, A, B, module.scaling, module.transposed)
        return Adapter("the run's own average", None, {}, kept)

    def save(self, folder: Path, save: str = "") -> Path:
        """Write the average into `folder`, whole or not at all, as part of `save`; return the file. Raises OSError."""
        about = {key: json.dumps(getattr(self, key)) for key in ("decay", "followed", "residual")}
        write_pairs(folder / AVERAGE_FILE, self.pairs, {**about, "save": save})
        return folder / AVERAGE_FILE

    @classmethod
    def load(cls, folder: Path, decay: float, save: str | None = None) -> Average | None:
        """Read what `save` wrote, to go on with this decay; None where there is none, or only that of another `save`.

        AdapterError for one that cannot be read.
        """
        path = folder / AVERAGE_FILE
        if not path.is_file():
            return None
        try:
            pairs, about = read_pairs(path)
            if save is not None and about.get("save") != save:
                return None
            return cls(decay, pairs, json.loads(about["followed"]), json.loads(about["residual"]))
        except (OSError, ValueError, KeyError) as error:
            advice = "The run's average is lost with it: take another checkpoint."
            raise AdapterError(f"{str(path)!r} {reading_fault(path, error, advice)}") from error


@dataclass
class RunAverage:
    """The average of a run's own updates, which takes one in every `every` optimizer steps; a `Kept`."""

    average: Average
    every: int
    name: str = "average"
    noun: str = "average of the run's updates"

    def adapter(self, factors: Mapping[str, LoraFactors]) -> Adapter:
        """Return the average as an adapter, as `Average.adapter`."""
        return self.average.adapter(factors)

    def entry(self) -> dict[str, Any]:
        """Return what a merge's line in the journal says of the average."""
        average = self.average
        return {"decay": average.decay, "followed": average.followed, "residual": average.residual}

    def after_step(self, at: RunPoint) -> None:
        """Take the updates of this step in where it is time; where that raises the average stays as it was."""
        if at.step % self.every == 0:
            self.average.follow(at.factors())

    def save(self, folder: Path, save: str) -> None:
        """Put the average beside the weights of a checkpoint, as part of `save`. Raises OSError."""
        self.average.save(folder, save)

    def load(self, folders: Sequence[Path], save: str | None) -> bool:
        """Go on from the average that `save` put into the first of these folders that has one; as `Kept.load`."""
        stored = from_first(all_or_none(lambda: self._read(folders, save) if rank() == 0 else None))
        self.average = stored or self.average
        return stored is not None

    def rewind(self, folders: Sequence[Path], save: str | None) -> None:
        """Take over the average of the checkpoint that the weights were reloaded from; without one it stays."""
        stored = attempt(self.name, lambda: self._read(folders, save))
        self.average = from_first(stored if isinstance(stored, Average) else self.average)

    def _read(self, folders: Sequence[Path], save: str | None) -> Average | None:
        averages = (Average.load(folder, self.average.decay, save) for folder in folders)
        return next((average for average in averages if average is not None), None)
