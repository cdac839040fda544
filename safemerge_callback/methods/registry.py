"""The one registry: a merge method is a file, and its file name is its name in YAML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..errors import ConfigError, nearest


class Merged(NamedTuple):
    """New factors in the live adapter's units, (*n, r, d_in) and (*n, d_out, r), and the relative residual (*n)."""

    A: Tensor
    B: Tensor
    residual: Tensor


@dataclass(frozen=True)
class Method:
    """A merge method: its function, the spaces it works in, what it needs, and whether it keeps the live rank.

    `merge(live, safety, *, weights, space, alignment_matrix)` takes a `LowRank` batch of modules of one shape, the
    safety adapters' updates in the live adapter's units, `weights` = (w_live, w_safety, ...) and returns `Merged`.
    """

    name: str
    merge: Callable[..., Merged]
    spaces: tuple[str, ...]
    needs: frozenset[str]
    keeps_rank: bool


METHODS: dict[str, Method] = {}


def register(
    *, spaces: tuple[str, ...], needs: frozenset[str], keeps_rank: bool = True
) -> Callable[[Callable[..., Merged]], Callable[..., Merged]]:
    """Enter a merge function under its own name."""

    def enter(merge: Callable[..., Merged]) -> Callable[..., Merged]:
        METHODS[merge.__name__] = Method(merge.__name__, merge, spaces, needs, keeps_rank)
        return merge

    return enter


def get_method(name: str) -> Method:
    """Return the method called `name`; ConfigError names the methods there are."""
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is unknown: choose one of {sorted(METHODS)}{nearest(name, METHODS)}")
    return METHODS[name]
