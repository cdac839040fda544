"""One side: every run with the package that comes first on the path, its evidence written as JSON.

`python -m tests.trajectory.witness.side PACKAGES OUTPUT [TEXT ...]` works in the current folder, which it fills.
"""

import json
import sys
import time
from pathlib import Path

import torch

import safemerge_callback

from . import runs


def require_package(packages):
    """End the process unless the package is the one in `packages`: an editable install must not come before it."""
    place = Path(safemerge_callback.__file__).resolve()
    if not place.is_relative_to(Path(packages).resolve()):
        raise SystemExit(f"the witness is to run the package in {packages}, and imported {place}")


def evidence_of(wanted=(), seconds=None):
    """Make every run whose name holds a text of `wanted` (all, if none) in the current folder; evidence by name.

    `seconds`, a dict, is told how long each run took.
    """
    torch.set_num_threads(1)
    found = {}
    for name, run in runs.runs(runs.make_world()):
        if not wanted or any(text in name for text in wanted):
            began = time.perf_counter()
            found |= {f"{name}/{part}": value for part, value in run().items()}
            if seconds is not None:
                seconds[name] = round(time.perf_counter() - began, 2)
    return found


if __name__ == "__main__":
    packages, output, *texts = sys.argv[1:]
    require_package(packages)
    spent = {}
    Path(output).write_text(json.dumps(evidence_of(texts, spent)), encoding="utf-8")
    Path(output).with_name("seconds.json").write_text(json.dumps(spent), encoding="utf-8")
