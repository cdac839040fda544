"""Digests of fixed runs, and whether a commit's package gives the same: `python -m tests.trajectory.witness`.

`--against COMMIT` runs this program with the package of that commit and with the working tree's, one process each, and
compares them piece by piece; it exits with 1 where any differs. What the working tree's package makes of the other's
journals and checkpoints is compared, too. Keys of a record that only the working tree's has are
told as added. The figures are one machine's: they are never stored, but made twice.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

from .comparison import Row, compared, table

ROOT = Path(__file__).parents[3]
PACKAGE = "safemerge_callback"


def main():
    """The command."""
    words = argparse.ArgumentParser(prog="python -m tests.trajectory.witness", description=__doc__.split("\n\n")[0])
    words.add_argument("--against", metavar="COMMIT", help="compare the working tree's package with that commit's")
    words.add_argument("--only", metavar="TEXT", nargs="+", default=[], help="only runs whose names hold one of these")
    words.add_argument("--all", action="store_true", help="with --against: list what is equal, too")
    given = words.parse_args()
    if given.against:
        return against(given.against, given.only, all_names=given.all)
    from .evidence import sha

    with tempfile.TemporaryDirectory() as folder:
        found = finished(start(ROOT, Path(folder), given.only))
    print(json.dumps({name: sha(value) for name, value in found.items()}, indent=1))
    return 0


def against(commit, only, *, all_names):
    """Compare both sides, print the table, return the exit code."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        packages, *folders = [Path(place, name) for name in ("packages", "before", "after", "taken-over")]
        for folder in (packages, *folders):
            folder.mkdir()
        unpack(commit, packages)
        sides = [start(packages, folders[0], only), start(ROOT, folders[1], only)]
        before, after = (finished(side) for side in sides)
        over = finished(start(ROOT, folders[2], only, "--take-over", str(folders[0])))
    rows = [*compared(before, after), *of_old_files(before, over)]
    print(table(rows, all_names=all_names))
    print(f"{commit} against the working tree, in {time.perf_counter() - began:.0f} s")
    return int(any(row.status == "DIFFERS" for row in rows) or not rows)


def of_old_files(before, over):
    """The rows of what the working tree makes of the commit's journals and checkpoints."""
    if not over and any(name.endswith("/report") for name in before):
        return [Row("of its files", "DIFFERS", "nothing was taken over")]
    old = {name: before[name] for name in over}
    return [row._replace(name=f"{row.name} (of its files)") for row in compared(old, over)]


def unpack(commit, folder):
    """Put the package of a commit into `folder`."""
    packed = subprocess.run(["git", "archive", commit, PACKAGE], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")


def start(packages, folder, only, *more):
    """Begin this program with the package in `packages` as a process of its own, whose working folder is `folder`."""
    told = {"PYTHONPATH": os.pathsep.join(map(str, (packages, ROOT))), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    output = folder / "evidence.json"
    command = [sys.executable, "-m", "tests.trajectory.witness.side", str(packages), str(output), *only, *more]
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | told | quiet, stdout=said, stderr=said)
    return process, output


def finished(side):
    """Wait for a side, and return its evidence."""
    process, output = side
    if process.wait():
        said = output.with_name("said.txt").read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"{said[-4000:]}\na side of the witness ended with {process.returncode}")
    return json.loads(output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
