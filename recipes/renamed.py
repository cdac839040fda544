"""Commands that moved from `recipes` to `method_comparison`: the old name works for two minor versions, and warns."""

from __future__ import annotations

import runpy
import sys
import warnings


def run_renamed(name: str) -> None:
    """Run `method_comparison.<name>` as if it had been called, on the same arguments, of which grids moved along.

    By name: the recipes import nothing of the comparison that is made of them.
    """
    warnings.warn(f"recipes.{name} is now method_comparison.{name}: call that", DeprecationWarning, 2)
    sys.argv[1:] = [word.replace("configs/compare/", "method_comparison/grids/") for word in sys.argv[1:]]
    runpy.run_module(f"method_comparison.{name}", run_name="__main__", alter_sys=True)
