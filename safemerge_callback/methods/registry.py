"""The one registry: a merge method is a file, and its file name is its name in YAML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from ..errors import ConfigError, PlanError, shown
from ..io.choices import one_of
from ..io.numbers import is_number
from ..ops import SIGN_METHODS, AlignmentMatrix, Basis, LowRank, accumulation_dtype, full_precision


class Merged(NamedTuple):
    """New factors in the live adapter's units, (*n, r, d_in) and (*n, d_out, r), and the relative residual (*n)."""

    A: Tensor
    B: Tensor
    residual: Tensor


class How(TypedDict, total=False):
    """How a merge is made, one set of keywords for all methods.

    weights: (w_live, w_safety, ...), each a number or one a module, (*n). space: `delta` or `factor`.
    alignment_matrix: V of the modules, or a basis of it. density: the share of entries to keep. generator: on the CPU;
    where a batch has several modules they draw from it in turn.
    """

    weights: Sequence[float | Tensor]
    space: str
    alignment_matrix: AlignmentMatrix | Basis | None
    density: float | None
    majority_sign_method: str
    generator: torch.Generator | None


_KNOBS = frozenset({"density", "majority_sign_method", "generator"})


@dataclass(frozen=True)
class Method:
    """A merge method: its function, the spaces it works in, what it needs and reads, whether it keeps the live rank.

    `function(live, safety, *, weights, ...)` declares the keywords of `merge` that it reads, and no others.

    `needs`: what must be there: `safety_adapter`, `subspace` or `average` (the run's own). `optional`: what is used
    where it is there. `dense`: whether space `delta` forms the d_out × d_in updates, which a mask on their entries
    cannot do without. `additive`: the spaces in which the result is Σ wᵢ·ΔWᵢ, so that weights may fade in or be shared
    out over events. `signed`: whether a negative weight means to take an update away. `several`: whether there may be
    more than one safety adapter. `strength`: of a method that goes a share of the way to a target, the share by
    default; such a one has weights (1 - share, share).
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

    def merge(self, live: LowRank, safety: Sequence[LowRank], **how: Unpack[How]) -> Merged:
        """Return the merged factors of a `LowRank` batch of modules of one shape.

        `safety`: the other adapters' updates in the live adapter's units. The method is given what it reads of `how`;
        TypeError for a keyword that no method has.
        """
        if unknown := how.keys() - How.__annotations__.keys():
            raise TypeError(f"merge has no keywords {sorted(unknown)}: it has {sorted(How.__annotations__)}")
        return self.function(live, safety, **{name: value for name, value in how.items() if name in self.reads})

    @cached_property
    def reads(self) -> frozenset[str]:
        """The keywords that the method reads."""
        return frozenset(p.name for p in signature(self.function).parameters.values() if p.kind is p.KEYWORD_ONLY)

    @property
    def takes(self) -> frozenset[str]:
        """Those of them that not every method has a use for."""
        return self.reads & _KNOBS

    @property
    def weighted(self) -> bool:
        """Whether the user gives weights, one an update."""
        return "safety_adapter" in self.needs

    @property
    def takes_away(self) -> bool:
        """Whether a merge leaves the share w_live of the task's own update."""
        return "safety_adapter" in self.needs | self.optional

    @property
    def random(self) -> bool:
        """Whether the result depends on the state of a generator."""
        return "generator" in self.takes


class More(TypedDict, total=False):
    """The fields of `Method` that have a default."""

    additive: tuple[str, ...]
    signed: bool
    several: bool
    optional: frozenset[str]
    strength: float | None


METHODS: dict[str, Method] = {}


def register(
    *,
    spaces: tuple[str, ...],
    needs: frozenset[str],
    dense: bool = False,
    keeps_rank: bool = True,
    **more: Unpack[More],
) -> Callable[[Callable[..., Merged]], Callable[..., Merged]]:
    """Enter a merge function, in full precision, under its own name; the fields are those of `Method`."""

    def enter(merge: Callable[..., Merged]) -> Callable[..., Merged]:
        whole = full_precision()(merge)
        METHODS[merge.__name__] = Method(merge.__name__, whole, spaces, needs, dense, keeps_rank, **more)
        return whole

    return enter


def get_method(name: str) -> Method:
    """Return the method called `name`; ConfigError names the methods there are."""
    return METHODS[one_of(name, sorted(METHODS), "method")]


def check_density(method: str, density: Any) -> float | None:
    """Return `density` as a float in (0, 1], or None for a method that reads none; ConfigError otherwise.

    A method that prunes has no density of its own: one that is left out is refused, too.
    """
    able = sorted(name for name, other in METHODS.items() if "density" in other.takes)
    if "density" not in get_method(method).takes:
        if density is not None:
            raise ConfigError(
                f"density is {shown(density)}, which method {method!r} does not read: leave it out, or choose one of "
                f"{able}"
            )
        return None
    allowed = "give the share of entries to keep, above 0 and at most 1, such as 0.5"
    if density is None:
        raise ConfigError(f"density is missing, method {method!r} prunes by it: {allowed}")
    if not is_number(density) or not 0 < density <= 1:
        raise ConfigError(f"density is {shown(density)}: {allowed}")
    return float(density)


def check_majority_sign(method: str, majority_sign_method: Any) -> str:
    """Return `majority_sign_method`; ConfigError if it is unknown, or set for a method that elects no sign."""
    sign = one_of(majority_sign_method, SIGN_METHODS, "majority_sign_method")
    if sign != SIGN_METHODS[0] and "majority_sign_method" not in get_method(method).takes:
        able = sorted(name for name, other in METHODS.items() if "majority_sign_method" in other.takes)
        raise ConfigError(
            f"majority_sign_method is {sign!r}, but method {method!r} elects no sign: leave it out, or "
            f"choose one of {able}"
        )
    return sign


def needed_density(method: str, density: float | None) -> float:
    """Return `density` for a method that takes one; ConfigError if it is None or outside (0, 1]."""
    checked = check_density(method, density)
    return 1.0 if checked is None else checked


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
