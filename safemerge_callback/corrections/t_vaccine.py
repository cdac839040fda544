"""`t_vaccine`: as `vaccine`, in a few layers at a time, drawn by how large the gradient of harmful answers is there."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, shown
from ..io.numbers import is_whole
from ..live.batch_hooks import batch_hooks
from ..live.faults import Fault, attempt
from ..record.metrics import Metric
from ..signals.model_state import preserve_state
from .harmful_rows import HarmfulRowSettings, harmful_rows, mean_loss
from .perturbed_blocks import Blocks, output_gradients
from .protocol import RunPoint, RunStart
from .registry import correction
from .state_file import read_state, write_state
from .vaccine import FIGURES, Vaccine, VaccineSettings

STATE_FILE = "safemerge_t_vaccine.json"


@dataclass(frozen=True, kw_only=True)
class TVaccineSettings(HarmfulRowSettings, VaccineSettings):
    """What `t_vaccine` reads of its entry in the list of corrections.

    Every `measure_every` steps the gradient of `batch_size` harmful rows says how much each block matters; every
    `draw_every` steps `num_blocks` are drawn with such odds. Their outputs are perturbed, as `share`, `rho` and
    `blocks` of `vaccine` say, and of all layers theirs alone are trained.
    """

    batch_size: int = 8
    num_blocks: int = 8
    measure_every: int = 200
    draw_every: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_blocks", "measure_every", "draw_every"):
            if not is_whole(getattr(self, name), 1):
                raise ConfigError(f"{name} is {shown(getattr(self, name))}: give a whole number of 1 or more")


def block_norms(model: nn.Module, blocks: Blocks, rows: Sequence[Any]) -> list[float]:
    """Return the norm of the gradient of the rows' mean loss by each block's outputs, of all rows together.

    One forward and backward pass in evaluation mode; the model is left as it was. ValueError where one is not finite,
    and where all are 0.
    """
    with preserve_state(model, gradients=True), output_gradients(blocks) as gradients:
        _, by_outputs = gradients(mean_loss(model, rows))
        norms = torch.stack([gradient.float().norm() for gradient in by_outputs]).tolist()
    if not all(map(math.isfinite, norms)) or not any(norms):
        raise ValueError("the gradient of the harmful rows is not finite in every block, or 0 in all")
    return norms


def drawn(norms: Sequence[float], count: int, key: str) -> list[int]:
    """Return `count` places in their order, drawn without replacement with odds by their norms; `key` decides.

    One after the other, as from an urn: the largest of u^(1/norm), u uniform. What has a norm of 0 comes last.
    """
    source = random.Random(key)
    ranks = [
        (math.log(1.0 - source.random()) / norm if norm > 0 else -math.inf, -place) for place, norm in enumerate(norms)
    ]
    best = sorted(range(len(norms)), key=lambda place: ranks[place], reverse=True)
    return sorted(best[:count])


class TVaccine(Vaccine):
    """The perturbation of one run's own batches, and which layers it is in."""

    name = "t_vaccine"
    noun = "choice of layers"

    def __init__(self, settings: TVaccineSettings) -> None:
        super().__init__(settings)
        self.chooses = settings
        self.norms: list[float] = []
        self.chosen: list[int] = []
        # The steps that were done when each was made.
        self.measured = self.drew = -1

    def prepare(self, start: RunStart) -> None:
        """Read the rows and look for the blocks. Collective. Raises ConfigError as both, and for too few blocks."""
        self.rows = harmful_rows(self.name, self.chooses, start)
        super().prepare(start)
        trained = [name for name, p in start.model.named_parameters() if p.requires_grad]
        self.blocks = {
            path: block
            for path, block in self.blocks.items()
            if any(name.startswith(f"{_layer(path)}.") for name in trained)
        }
        if len(self.blocks) < self.chooses.num_blocks:
            raise ConfigError(
                f"num_blocks is {self.chooses.num_blocks}, and {len(self.blocks)} attention blocks are in layers that "
                "are trained: give no more than those"
            )

    @contextmanager
    def batches(self, at: RunPoint) -> Iterator[list[Fault]]:
        """Perturb the batches that pass within, and train, in the layers that are drawn.

        Source: T-Vaccine, arXiv:2410.09760. Differs: odds from a whole batch of harmful answers, where its released
        code has one; layers are spared by `requires_grad` while they pass, and no installed file is rewritten.
        """
        said = self._choose(at)
        paths = list(self.blocks)
        idle = [_layer(path) for place, path in enumerate(paths) if place not in self.chosen]
        blocks = {paths[place]: self.blocks[paths[place]] for place in self.chosen}
        with spared(self.model, idle), self.perturbed(blocks, at) as faults:
            faults += said
            yield faults

    def _choose(self, at: RunPoint) -> list[Fault]:
        """Measure and draw where it is time to; what goes wrong in a measurement leaves the odds as they were."""
        settings, faults = self.chooses, []
        if self.measured < 0 or at.step - self.measured >= settings.measure_every:
            self.measured = at.step
            with self.watch.lap():
                norms = attempt(self.name, lambda: block_norms(self.model, self.blocks, self.rows.batch(at)))
            if isinstance(norms, Fault):
                faults.append(norms)
                norms = self.norms or [1.0] * len(self.blocks)
            self.norms = norms
        if self.drew < 0 or at.step - self.drew >= settings.draw_every:
            self.drew = at.step
            self.chosen = drawn(self.norms, settings.num_blocks, f"{settings.seed} {at.step}")
        return faults

    def figures(self) -> Mapping[str, float]:
        """Return those of `vaccine`, and the odds of the first draw's likeliest block. Collective."""
        odds = {"odds_max": max(self.norms) / sum(self.norms)} if self.norms else {}
        return {**super().figures(), **odds}

    def after_step(self, at: RunPoint) -> None:
        """Nothing follows a step: what is kept moves when layers are drawn."""

    def save(self, folder: Path, save: str) -> None:
        """Write the odds and the layers in force. Raises OSError."""
        paths = list(self.blocks)
        of_blocks = {
            "norms": dict(zip(paths, self.norms, strict=True)) if self.norms else {},
            "chosen": [paths[place] for place in self.chosen],
        }
        state = {**of_blocks, "measured": self.measured, "drew": self.drew}
        write_state(folder / STATE_FILE, save, state)

    def load(self, folders: Sequence[Path], save: str | None) -> bool:
        """Go on from there; as `Kept.load`."""
        return bool(read_state(folders, STATE_FILE, save, self._take_up, "which layers are trained"))

    def _take_up(self, state: Mapping[str, Any]) -> bool:
        """Take the state over; ValueError for one of another model or other settings."""
        norms, paths = dict(state["norms"]), list(self.blocks)
        if norms and norms.keys() != self.blocks.keys():
            raise ValueError(f"it has {len(norms)} blocks and the model {len(paths)}, or others")
        self.norms = [float(norms[path]) for path in paths] if norms else []
        self.chosen = [paths.index(path) for path in state["chosen"]]
        self.measured, self.drew = int(state["measured"]), int(state["drew"])
        return True

    def rewind(self, folders: Sequence[Path], save: str | None) -> None:
        """The weights are an earlier step's again; the layers go on from where they are."""


@contextmanager
def spared(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Within, passes of the layers of these paths give no gradient to their parameters, which are as ever in between.

    By hooks on what a layer is made of: under checkpointing that passes once more on the way back, and the layer itself
    need not.
    """
    with batch_hooks(model, "t_vaccine layers") as hooks:
        for part in (part for path in paths for part in _parts(model.get_submodule(path))):
            trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
            hooks.before(part, partial(_require_grad, trained, False))
            hooks.after(part, partial(_require_grad, trained, True), always=True)
            hooks.stack.callback(_require_grad, trained, True)
        yield


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules within one that its forward calls, none within another."""
    for part in module.children():
        if isinstance(part, nn.ModuleList | nn.ModuleDict):
            yield from _parts(part)
        else:
            yield part


def _require_grad(parameters: Sequence[nn.Parameter], required: bool, *_passed: Any) -> None:
    for parameter in parameters:
        parameter.requires_grad_(required)


def _layer(path: str) -> str:
    """The path of the layer that a block is in."""
    return path.rpartition(".")[0]


@correction(
    TVaccineSettings,
    cost="as vaccine, backward through the drawn layers alone; a pass over harmful rows every measure_every steps",
    deed="a few layers were trained, their outputs perturbed",
    figures={
        **FIGURES,
        "odds_max": Metric("share", "last", "Odds of the block with the largest gradient of harmful answers."),
    },
    engines=("one process",),
)
def t_vaccine(settings: TVaccineSettings) -> TVaccine:
    """Return the correction of one run."""
    return TVaccine(settings)
