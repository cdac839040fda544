"""The `safemerge` command: the package's verbs on files. What a verb needs is imported when it runs."""

from . import adapters, compare, evaluation, first_steps, gate, hub, rows, runs, search, subspaces
from .app import app, main

__all__ = [
    "adapters",
    "app",
    "compare",
    "evaluation",
    "first_steps",
    "gate",
    "hub",
    "main",
    "rows",
    "runs",
    "search",
    "subspaces",
]
