"""One side: every run with the package that comes first on the path, its evidence written as JSON.

`python -m tests.trajectory.witness.side PACKAGES OUTPUT [TEXT ...]` works in the current folder, which it fills. With
`--take-over FOLDER` it does not make the runs, but goes on with what another side left in its folder.
"""

import argparse
import json
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


def evidence_of(made, wanted=(), seconds=None):
    """Make every run whose name holds a text of `wanted` (all, if none) in the current folder; evidence by name.

    `seconds`, a dict, is told how long each run took.
    """
    found = {}
    for name, run in made:
        if not wanted or any(text in name for text in wanted):
            began = time.perf_counter()
            found |= {f"{name}/{part}": value for part, value in run().items()}
            if seconds is not None:
                seconds[name] = round(time.perf_counter() - began, 2)
    return found


def main():
    """The command."""
    words = argparse.ArgumentParser(prog="python -m tests.trajectory.witness.side")
    words.add_argument("packages", type=Path)
    words.add_argument("output", type=Path)
    words.add_argument("texts", nargs="*")
    words.add_argument("--take-over", type=Path)
    given = words.parse_args()
    require_package(given.packages)
    torch.set_num_threads(1)
    world, spent = runs.make_world(), {}
    made = runs.taken_over(world, given.take_over) if given.take_over else runs.runs(world)
    given.output.write_text(json.dumps(evidence_of(made, given.texts, spent)), encoding="utf-8")
    given.output.with_name("seconds.json").write_text(json.dumps(spent), encoding="utf-8")


if __name__ == "__main__":
    main()
