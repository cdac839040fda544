"""What one check costs a run in each tracker, writing to a local folder: milliseconds until training goes on.

python -m benchmarks.tracker_cost [--trackers wandb tensorboard mlflow trackio] [--layers 32] [--checks 200]
    [--output FILE.json]

A check is sent as the callback sends it: the numbers, a row of each of 7 modules a layer, and at checks 1, 2, 4, 8 ...
the heat map of all checks so far. `median` is of the checks without a heat map, `heat_map` of those with one, and
`total` of all, in seconds. W&B runs offline, MLflow writes to SQLite.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from benchmarks.hardware import hardware, timed, title
from safemerge_callback.decision import MergePlan, Reading, Readings
from safemerge_callback.record.metrics import check_metrics
from safemerge_callback.record.progress import Progress
from safemerge_callback.training.trackers import TRACKERS, Report, Run, Trackers, decision_rows

TYPES = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]


def report(step: int, layers: int, rng: random.Random) -> Report:
    """Make up one check of 7 modules a layer, a few of them below the gate."""
    names = [f"layers.{layer}.{kind}" for layer in range(layers) for kind in TYPES]
    readings = (Reading(n, rng.gauss(0.5, 0.1), 0.7, 1.0, 16, (64, 64), null_std=0.01) for n in names)
    plan = MergePlan.decide(Readings(readings), threshold=0.35)
    return Report(step, check_metrics(plan, (), Progress(), 0.1), decision_rows(step, plan, {}))


@contextlib.contextmanager
def live(name: str, folder: Path) -> Iterator[None]:
    """Start the run of a tracker, as a trainer would, and end it."""
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_DIR=str(folder), TRACKIO_DIR=str(folder))
    if name == "wandb":
        import wandb

        with wandb.init(project="cost"):
            yield
    elif name == "mlflow":
        import mlflow

        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        mlflow.set_experiment(experiment_id=mlflow.create_experiment("cost", artifact_location=str(folder / "files")))
        with mlflow.start_run():
            yield
    elif name == "trackio":
        import trackio

        trackio.init(project="cost")
        yield
        trackio.finish()
    else:
        yield


def cost_of(name: str, layers: int, checks: int, folder: Path) -> dict[str, float]:
    """Send so many checks to one tracker; raises RuntimeError where it failed, since then nothing was measured."""
    rng, trackers = random.Random(0), Trackers()
    plain: list[float] = []
    drawn: list[float] = []
    with live(name, folder):
        trackers.attach([name], Run(folder, {"gate": "threshold"}))
        for step in range(1, checks + 1):
            one = report(step, layers, rng)
            seconds, _ = timed(partial(trackers.check, [name], one))
            (drawn if trackers.drift.shown else plain).append(1000 * seconds)
        trackers.close()
    if trackers.failed:
        raise RuntimeError(f"tracker {name!r} failed: {sorted(trackers.failed)}")
    return {
        "median": statistics.median(plain),
        "largest": max(plain),
        "heat_map": statistics.median(drawn),
        "heat_map_largest": max(drawn),
        "total": sum([*plain, *drawn]) / 1000,
    }


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trackers", nargs="+", choices=list(TRACKERS), default=list(TRACKERS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--checks", type=int, default=200)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    machine, costs = hardware(), {}
    for name in args.trackers:
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            costs[name] = cost_of(name, args.layers, args.checks, Path(folder))
    columns = ("median", "largest", "heat_map", "heat_map_largest", "total")
    about = f"{args.checks} checks of {7 * args.layers} modules, milliseconds a check; total in seconds"
    table = Table("tracker", *columns)
    for name, cost in costs.items():
        table.add_row(name, *(f"{cost[column]:.1f}" for column in columns))
    Console(width=132).print(title(machine), about, table, sep="\n")
    if args.output:
        results = {"hardware": machine, "checks": args.checks, "modules": 7 * args.layers, "milliseconds": costs}
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
