"""How the coefficients of a merge are found: a minimiser is a file; importing the folder fills the registry."""

from . import cma, golden, gradient, tezo
from .registry import MINIMISERS, Effort, Minimiser, Problem, get_minimiser, minimiser

__all__ = [
    "MINIMISERS",
    "Effort",
    "Minimiser",
    "Problem",
    "cma",
    "get_minimiser",
    "golden",
    "gradient",
    "minimiser",
    "tezo",
]
