"""The one registry: a merge method is a file, and its file name is its name in YAML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from ..errors import PlanError
from ..io.choices import one_of
from ..io.knobs import Knob
from ..ops import AlignmentMatrix, Basis, Grams, LowRank, accumulation_dtype, aligned_ranks, full_precision, refit

# The space in which factors are added, and the one in which their rank directions are aligned before.
FACTOR, ALIGNED_FACTOR = "factor", "aligned_factor"


class Merged(NamedTuple):
    """New factors in the live adapter's units, (*n, r, d_in) and (*n, d_out, r), and the relative residual (*n)."""

    A: Tensor
    B: Tensor
    residual: Tensor


class Keywords(TypedDict, total=False):
    """What a merge function is given beside its own knobs, the same for all methods.

    weights: (w_live, w_safety, ...), each a number or one a module, (*n). space: `delta`, `factor` or `aligned_factor`,
    which `Method.merge` makes `factor` of.
    alignment_matrix: V of the modules, or a basis of it. generator: on the CPU; where a batch has several modules they
    draw from it in turn. grams: of the modules' inputs.
    """

    weights: Sequence[float | Tensor]
    space: str
    alignment_matrix: AlignmentMatrix | Basis | None
    generator: torch.Generator | None
    grams: Grams | None


@dataclass(frozen=True)
class Method:
    """A merge method: its function, the spaces it works in, what it needs and reads, whether it keeps the live rank.

    `function(live, safety, *, weights, ...)` declares those of `Keywords` and of its own knobs that it reads, and no
    others.

    `needs`: what must be there: `safety_adapter`, `subspace`, `average` (the run's own), `grams` and module signals.
    `optional`: what is used where it is there. `dense`: whether space `delta` forms the d_out × d_in updates, which a
    mask on their entries cannot do without. `additive`: the spaces in which the result is Σ wᵢ·ΔWᵢ, so that weights may
    fade in or be shared out over events. `signed`: whether a negative weight means to take an update away. `several`:
    whether there may be more than one safety adapter. `strength`: of a method that goes a share of the way to a target,
    the share by default; such a one has weights (1 - share, share). `knobs`: those that it has beside space, weights
    and strength.
    """

    name: str
    function: Callable[..., Merged]
    spaces: tuple[str, ...]
    needs: frozenset[str]
    dense: bool
    keeps_rank: bool
    additive: tuple[str, ...] = ()
    signed: bool = False
    several: bool = True
    optional: frozenset[str] = frozenset()
    strength: float | None = None
    knobs: tuple[Knob, ...] = ()

    def merge(self, live: LowRank, safety: Sequence[LowRank], **keywords: Any) -> Merged:
        """Return the merged factors of a `LowRank` batch of modules of one shape.

        `safety`: the other adapters' updates in the live adapter's units. `keywords`: those of `Keywords`, and the
        knobs of methods; the method is given what it reads of them. TypeError for a keyword that no method has.
        """
        known = {*Keywords.__annotations__, *knobs()}
        if unknown := keywords.keys() - known:
            raise TypeError(f"merge has no keywords {sorted(unknown)}: it has {sorted(known)}")
        read = {name: value for name, value in keywords.items() if name in self.reads}
        if read.get("space") == ALIGNED_FACTOR:
            return self._in_aligned_factors(live, safety, read)
        return self.function(live, safety, **read)

    @full_precision()
    def _in_aligned_factors(self, live: LowRank, safety: Sequence[LowRank], read: dict[str, Any]) -> Merged:
        """Merge the factors of aligned rank spaces, at the largest rank, and bring the result into the live gauge.

        So it depends on the updates and not on the factors that they are written in, and ranks may differ.
        """
        still = unmoved(live, read["weights"])
        if still is not None:
            return still
        task, *others = aligned_ranks([live, *safety])
        merged = self.function(task, others, **{**read, "space": FACTOR})
        fitted, residual = refit(live, LowRank(merged.A, merged.B))
        return Merged(fitted.A, fitted.B, residual)

    @cached_property
    def reads(self) -> frozenset[str]:
        """The keywords that the method reads."""
        return frozenset(p.name for p in signature(self.function).parameters.values() if p.kind is p.KEYWORD_ONLY)

    @property
    def takes(self) -> frozenset[str]:
        """The knobs that it has and not every method, and `generator` where it draws."""
        return frozenset(knob.name for knob in self.knobs) | (self.reads & {"generator"})

    @property
    def weighted(self) -> bool:
        """Whether the user gives weights, one an update."""
        return "safety_adapter" in self.needs

    @property
    def takes_away(self) -> bool:
        """Whether a merge leaves the share w_live of the task's own update."""
        return self.weighted or (self.strength is not None and "safety_adapter" in self.optional)

    @property
    def random(self) -> bool:
        """Whether the result depends on the state of a generator."""
        return "generator" in self.takes


class MethodOptions(TypedDict, total=False):
    """The fields of `Method` that have a default."""

    additive: tuple[str, ...]
    signed: bool
    several: bool
    optional: frozenset[str]
    strength: float | None
    knobs: tuple[Knob, ...]


METHODS: dict[str, Method] = {}


def register(
    *,
    spaces: tuple[str, ...],
    needs: frozenset[str],
    dense: bool = False,
    keeps_rank: bool = True,
    **more: Unpack[MethodOptions],
) -> Callable[[Callable[..., Merged]], Callable[..., Merged]]:
    """Enter a merge function, in full precision, under its own name; the fields are those of `Method`.

    One that works in space `factor` works in `aligned_factor`, too.
    """
    spaces += (ALIGNED_FACTOR,) if FACTOR in spaces else ()

    def enter(merge: Callable[..., Merged]) -> Callable[..., Merged]:
        whole = full_precision()(merge)
        METHODS[merge.__name__] = Method(merge.__name__, whole, spaces, needs, dense, keeps_rank, **more)
        return whole

    return enter


def get_method(name: str) -> Method:
    """Return the method called `name`; ConfigError names the methods there are."""
    return METHODS[one_of(name, sorted(METHODS), "method")]


def knobs() -> dict[str, Knob]:
    """Return every knob that some method has declared, by name."""
    return {knob.name: knob for method in METHODS.values() for knob in method.knobs}


def readers(knob: str) -> list[str]:
    """Return the methods that have a knob, in order."""
    return sorted(name for name, method in METHODS.items() if any(declared.name == knob for declared in method.knobs))


def needed_generator(method: str, generator: torch.Generator | None) -> torch.Generator:
    """Return `generator`; PlanError if it is None or not on the CPU."""
    if generator is None or generator.device.type != "cpu":
        where = "none" if generator is None else f"one on {generator.device}"
        raise PlanError(
            f"method {method!r} draws masks from a generator on the CPU, got {where}: give torch.Generator(), seeded"
        )
    return generator


def unmoved(live: LowRank, weights: Sequence[float]) -> Merged | None:
    """Return the live factors to the bit where weights (1, 0, ...) ask for nothing but them; None otherwise.

    Not a matter of speed: a method that prunes would thin the live update, and count the signs of one of weight 0.
    """
    if weights[0] != 1.0 or any(weights[1:]):
        return None
    dtype = accumulation_dtype(*live)
    return Merged(live.A.to(dtype), live.B.to(dtype), live.A.new_zeros(live.A.shape[:-2], dtype=torch.float64))
