"""Floor 2: merge methods, one a file; importing the floor fills the registry."""

from . import (
    antidote,
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
    regmean,
    slerp,
    ties,
)
from .how import How, as_how, method_of
from .registry import METHODS, Merged, Method, get_method
from .weights import DEFAULT_WEIGHTS, check_merge, merge_weights

__all__ = [
    "DEFAULT_WEIGHTS",
    "METHODS",
    "How",
    "Merged",
    "Method",
    "antidote",
    "as_how",
    "breadcrumbs",
    "cat",
    "check_merge",
    "dare_linear",
    "dare_ties",
    "della",
    "ema",
    "get_method",
    "linear",
    "magnitude_prune",
    "merge_weights",
    "method_of",
    "orthogonal",
    "pcb",
    "project",
    "pull",
    "regmean",
    "slerp",
    "ties",
]
