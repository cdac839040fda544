"""The `safemerge` command: the package's verbs on files. What a verb needs is imported when it runs."""

from . import adapters, compare, evaluation, first_steps, gate, rows, runs, search, subspaces
from .app import app, main

__all__ = [
    "adapters",
    "app",
    "compare",
    "evaluation",
    "first_steps",
    "gate",
    "main",
    "rows",
    "runs",
    "search",
    "subspaces",
]
