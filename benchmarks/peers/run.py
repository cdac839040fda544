"""Run TRL's (or transformers') own trainer tests offline, without the callback and with it watching, and compare.

python -m benchmarks.peers.run CHECKOUT [--tests tests/test_sft_trainer.py ...] [--output FILE.json]

CHECKOUT is a copy of that repository; nothing of it is part of this one. What its tests fetch from the Hub is made on
the spot (stand_ins.py), so many tests that assert on the real models fail, in both runs alike.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = [f"tests/test_{name}_trainer.py" for name in ("sft", "dpo", "kto", "reward", "grpo", "rloo")]


def outcomes(checkout: Path, tests: list[str], select: str, home: Path, watch: bool) -> dict[str, dict]:
    """Run the tests in a process of their own; return node id -> outcome, why, and how many trainings were watched."""
    report = Path(tempfile.mkdtemp()) / "report"
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(checkout), os.environ.get("PYTHONPATH")])),
        "PEERS_REPORT": str(report),
        "PEERS_WATCH": str(int(watch)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.peers.plugin", "-n", "2", "-q", "-o", "addopts="]
    command += ["--timeout", "120", "-p", "no:cacheprovider", "-k", select, *tests]
    subprocess.run(command, cwd=checkout, env=environment, check=False, stdout=subprocess.DEVNULL)
    outcomes_of_tests: dict[str, dict] = {}
    for part in report.parent.glob("report.*"):
        outcomes_of_tests.update(json.loads(part.read_text()))
    return outcomes_of_tests


def compare(without: dict[str, dict], watched: dict[str, dict]) -> dict:
    """Return counts by file, and every test that ended otherwise."""
    files: dict[str, Counter] = {}
    for test, entry in watched.items():
        counts = files.setdefault(test.split("::")[0], Counter())
        counts[entry["outcome"]] += 1
        counts["watched"] += "watched" in entry
        counts["watched and passed"] += "watched" in entry and entry["outcome"] == "passed"
    tests = without.keys() | watched.keys()
    pairs = {t: [x.get(t, {}).get("outcome") for x in (without, watched)] for t in sorted(tests)}
    return {
        "files": {name: dict(counts) for name, counts in sorted(files.items())},
        "checks": sum(entry.get("checks", 0) for entry in watched.values()),
        "differ": {t: [*pair, watched.get(t, {}).get("why")] for t, pair in pairs.items() if pair[0] != pair[1]},
    }


def main() -> None:
    """Make the stand-ins, run both, print and write the comparison."""
    import transformers
    from rich.console import Console
    from rich.table import Table

    from benchmarks.peers.stand_ins import make_models, model_names
    from recipes.models import load_embedded

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--tests", nargs="*", default=TESTS)
    parser.add_argument("--select", default="peft or lora or Peft", help="pytest's -k; '' for all, most without LoRA")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp())
    transformers.logging.disable_progress_bar()
    _, tokenizer = load_embedded()
    failed = make_models(model_names(options.checkout / "tests"), tokenizer, home / "hub")
    checkout = options.checkout.resolve()
    result = compare(*(outcomes(checkout, options.tests, options.select, home, watch) for watch in (False, True)))
    result["models not made"] = failed
    table = Table(
        "file", "passed", "failed", "skipped", "watched", "of these passed", title="with the callback watching"
    )
    for name, counts in result["files"].items():
        keys = ("passed", "failed", "skipped", "watched", "watched and passed")
        table.add_row(name, *(str(counts.get(key, 0)) for key in keys))
    console = Console()
    console.print(table)
    console.print(f"{result['checks']} checks; {len(result['differ'])} tests end otherwise than without the callback")
    console.print(result["differ"])
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
