"""Floor 2: merge methods, one a file; importing the floor fills the registry."""

from . import (
    breadcrumbs,
    cat,
    dare_linear,
    dare_ties,
    della,
    ema,
    linear,
    magnitude_prune,
    orthogonal,
    pcb,
    project,
    pull,
    slerp,
    ties,
)
from .registry import METHODS, How, Merged, Method, check_density, check_majority_sign, get_method

__all__ = [
    "METHODS",
    "How",
    "Merged",
    "Method",
    "breadcrumbs",
    "cat",
    "check_density",
    "check_majority_sign",
    "dare_linear",
    "dare_ties",
    "della",
    "ema",
    "get_method",
    "linear",
    "magnitude_prune",
    "orthogonal",
    "pcb",
    "project",
    "pull",
    "slerp",
    "ties",
]
