"""Floor 0: merge methods, one a file; importing the floor fills the registry."""

from . import (
    breadcrumbs,
    cat,
    dare_linear,
    dare_ties,
    della,
    linear,
    magnitude_prune,
    orthogonal,
    pcb,
    project,
    slerp,
    ties,
)
from .registry import METHODS, Merged, Method, check_density, check_majority_sign, get_method

__all__ = [
    "METHODS",
    "Merged",
    "Method",
    "breadcrumbs",
    "cat",
    "check_density",
    "check_majority_sign",
    "dare_linear",
    "dare_ties",
    "della",
    "get_method",
    "linear",
    "magnitude_prune",
    "orthogonal",
    "pcb",
    "project",
    "slerp",
    "ties",
]
