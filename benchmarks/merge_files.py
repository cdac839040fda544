"""Merging two adapter folders at a model's size: seconds and the peak of resident memory, in a fresh process each.

python -m benchmarks.merge_files [--modules 224] [--size 4096] [--rank 16] [--folder DIR] [--output FILE.json]

The files are those of `benchmarks.sweep`. Every module is merged (threshold 1). The peak (VmHWM) is the whole
process's: Python, torch and what it brings, pages of mapped files while they are mapped, and the work. What was there
before the work, imports included, is given beside it.
"""

from __future__ import annotations

from benchmarks.sweep import run

_MERGE = """
import shutil
from safemerge_callback.offline import merge_adapters
def work():
    shutil.rmtree("out", ignore_errors=True)
    plan = merge_adapters("task", "safety", "subspace.safetensors", "out", threshold=1.0, method="%s")
    shutil.rmtree("out")
    return {"merged": len(plan.selected), "modules": len(plan.readings)}
report(work)
"""


def main():
    """Run the benchmark."""
    run(__doc__, {"linear, V from the disk": _MERGE % "linear", "linear": _MERGE % "linear", "cat": _MERGE % "cat",
                  "project": _MERGE % "project"})  # fmt: skip


if __name__ == "__main__":
    main()
