"""Floor 0: merge methods, one a file; importing the floor fills the registry."""

from . import cat, linear, project
from .registry import METHODS, Merged, Method, get_method

__all__ = ["METHODS", "Merged", "Method", "cat", "get_method", "linear", "project"]
