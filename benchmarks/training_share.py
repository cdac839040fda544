"""What the callback takes of a training run: the same training without it, with it, and with it asynchronous.

python -m benchmarks.training_share [--steps 100] [--every 25] [--repeats 3] [--output FILE.json] [SETTING ...]

The training is that of the demo (configs/finetune/smollm2_sentiment.yaml, SmolLM2-135M-Instruct, 60 modules): same
data, order, seed and start in every arm. After a short run that is not counted the arms take turns, each turn from the
next one on. Two figures an arm: the callback's own clock, which is the time that training waited in its hooks, the
opening of the files among them, and the wall clock against the run without it of the same turn. The second also holds
what an asynchronous check takes from the steps beside it, and all noise: its range over the turns is shown, and on a
shared machine it is wider than the cost. Everything after the options is a setting of all arms: `--max_length 128`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.hardware import hardware, title
from recipes.demo import callback_cost, machine_settings, set_environment, silence, train_arm
from recipes.processor import measured_pace

# Targets of the callback's share of the wall clock.
TARGETS = {"synchronous": 0.01, "asynchronous": 0.003}
Run = dict[str, Any]
# An arm, a folder for its files, and how many steps -> its run.
Train = Callable[[str, Path, int], Run]
_WARM_UP_STEPS = 2


def arms() -> list[str]:
    """Return the arms that this release has."""
    from safemerge_callback import SafeMergeConfig

    asynchronous = any(knob.name == "asynchronous" for knob in fields(SafeMergeConfig))
    return ["none", "synchronous", *["asynchronous"] * asynchronous]


@contextmanager
def demo_training(every: int, settings: Sequence[str]) -> Iterator[Train]:
    """Yield a function that trains an arm in a folder and returns its seconds and what the callback did."""
    from recipes.models import SAFETY_ADAPTER, checkpoint
    from safemerge_callback import build_subspace

    aligned, shipped = checkpoint("embedded-aligned"), checkpoint("embedded")
    silence()
    common = [*machine_settings(measured_pace()), *settings, "--report_to", "none"]
    with tempfile.TemporaryDirectory() as folder:
        subspace = Path(folder) / "subspace.safetensors"
        build_subspace(
            subspace, aligned=aligned, unaligned=shipped, target_modules=["q_proj", "v_proj"], progress=False
        )
        guard = ["--safemerge_subspace", str(subspace), "--safemerge_safety_adapter", str(SAFETY_ADAPTER)]
        guard += ["--safemerge_every", str(every)]

        def train(arm: str, output: Path, steps: int) -> Run:
            chosen = [*common, "--max_steps", str(steps)]
            if arm == "none":
                return _seconds(train_arm("smollm2_sentiment", output, chosen))
            beside = ["--safemerge_asynchronous", "true"] if arm == "asynchronous" else []
            run = _seconds(train_arm("smollm2_sentiment_safemerge", output, [*chosen, *guard, *beside]))
            return {**run, "callback": callback_cost(output / "safemerge.jsonl", run["seconds"])}

        yield train


def _seconds(run: Run) -> Run:
    return {"seconds": run["train_seconds"], "losses": run["losses"]}


def study(train: Train, names: Sequence[str], steps: int, repeats: int, folder: Path) -> dict[str, list[Run]]:
    """Train every arm `repeats` times in turns; arm -> its runs."""
    train("none", folder / "warm-up", _WARM_UP_STEPS)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            runs[name].append(train(name, folder / f"{name}-{turn}", steps))
    return runs


def shares(runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """Return a row an arm: its own share of its training, and its wall clock over that of `none`, less 1, by turn."""
    rows = []
    for name, of_arm in runs.items():
        row: dict[str, Any] = {"arm": name, "seconds": statistics.median(run["seconds"] for run in of_arm)}
        if name != "none":
            pairs = zip(of_arm, runs["none"], strict=True)
            more = [run["seconds"] / plain["seconds"] - 1 for run, plain in pairs]
            callback_shares = [run["callback"]["share"] for run in of_arm]
            counts = {key: of_arm[0]["callback"][key] for key in ("checks", "merges", "modules_merged")}
            row |= {"own_share": statistics.median(callback_shares), "own_shares": callback_shares, **counts}
            row |= {"wall": statistics.median(more), "walls": more, "target": TARGETS[name]}
        rows.append(row)
    return rows


def report(results: dict[str, Any]) -> None:
    """Print a row an arm."""
    table = Table("callback", "training, s", "checks", "merges", "own share", "target", "wall clock, more", "its range")
    for row in results["rows"]:
        if row["arm"] == "none":
            table.add_row("none", f"{row['seconds']:.1f}")
            continue
        counts = str(row["checks"]), str(row["merges"])
        share, target = f"{100 * row['own_share']:.2f} %", f"{100 * row['target']:.1f} %"
        wall = f"{100 * row['wall']:+.1f} %", f"{100 * min(row['walls']):+.1f} to {100 * max(row['walls']):+.1f} %"
        table.add_row(row["arm"], f"{row['seconds']:.1f}", *counts, share, target, *wall)
    said = (
        [] if "asynchronous" in results["runs"] else ["Asynchronous: not measured, this release has no such setting."]
    )
    Console(width=132).print(title(results["hardware"]), results["about"], table, *said, sep="\n")


def main() -> None:
    """Train every arm and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path)
    options, settings = parser.parse_known_args()
    machine = hardware()
    with tempfile.TemporaryDirectory() as folder:
        set_environment(Path(folder))
        warnings.simplefilter("ignore")
        settings = ["--seed", str(options.seed), *settings]
        with demo_training(options.every, settings) as train:
            runs = study(train, arms(), options.steps, options.repeats, Path(folder))
    what = (
        f"{options.steps} steps, a check every {options.every} and at the end, {options.repeats} runs an arm in turns"
    )
    results = {
        "hardware": machine,
        "about": f"{what}, seed {options.seed}, settings {settings}",
        "rows": shares(runs),
        "runs": runs,
    }
    report(results)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
