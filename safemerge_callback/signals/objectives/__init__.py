"""What the coefficients of a merge are chosen by: an objective is a file; importing the folder fills the registry."""

from . import cocktail, cross_entropy, entropy, kl
from .registry import OBJECTIVES, Objective, get_objective, objective

__all__ = ["OBJECTIVES", "Objective", "cocktail", "cross_entropy", "entropy", "get_objective", "kl", "objective"]
