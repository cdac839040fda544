"""A made-up run, written as a real one is: for looking at the report without training anything.

    python -m recipes.example_run runs/example --layers 32 --checks 40

Every figure in it is invented: cosines fall, the gate's merges lift them again, a probe is asked before and after. The
readings, the gate's verdicts and the journal come out of the code that a training uses.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recipes.command import run_command
from safemerge_callback.decision import Edit, Gate, MergePlan, Reading, Readings
from safemerge_callback.evaluation.measure import Kind, as_share, share_of
from safemerge_callback.evaluation.probe import Answers
from safemerge_callback.record import JOURNAL_FILE, Journal
from safemerge_callback.record.entries import (
    Sources,
    check_entry,
    end_entry,
    gradient_entry,
    merge_entry,
    probe_entry,
    start_entry,
)
from safemerge_callback.record.history import TermReading
from safemerge_callback.record.progress import Progress

# Name, (d_out, d_in) and null cosine of the module types of a Llama.
TYPES = {
    "self_attn.q_proj": ((4096, 4096), 0.22),
    "self_attn.k_proj": ((1024, 4096), 0.37),
    "self_attn.v_proj": ((1024, 4096), 0.36),
    "self_attn.o_proj": ((4096, 4096), 0.2),
    "mlp.gate_proj": ((14336, 4096), 0.13),
    "mlp.up_proj": ((14336, 4096), 0.12),
    "mlp.down_proj": ((4096, 14336), 0.19),
}
WEIGHTS = (0.9, 0.1)
# Seconds that the rows of ten steps take.
_PASSES = 1.9


def write_example(
    folder: str | Path,
    layers: int = 32,
    types: Sequence[str] = tuple(TYPES),
    checks: int = 40,
    gate: Gate | None = None,
    *,
    replayed: bool = False,
) -> Path:
    """Write the journal of a run that never was into `folder`, new, and return its path; `gate` is threshold 0.35.

    `replayed`: whether safety rows were in its steps as well.
    """
    rule = gate or Gate("threshold", threshold=0.35)
    path = Path(folder) / JOURNAL_FILE
    path.unlink(missing_ok=True)
    journal = Journal(path)
    journal.append(_start(rule, layers * len(types)))
    names = [f"layers.{i}.{kind}" for i in range(layers) for kind in types]
    for entry in _entries(rule, names, checks, replayed=replayed):
        journal.append(entry)
    return path


def _entries(rule: Gate, names: Sequence[str], checks: int, *, replayed: bool) -> Iterator[dict[str, Any]]:
    draw, left = random.Random(3), dict.fromkeys(names, 1.0)
    heights = {name: 0.47 + 0.22 * draw.random() + 0.05 * math.sin(index / 9) for index, name in enumerate(names)}
    merges = 0
    yield _probe(0, "begin", 0.97, 0.01)
    for number in range(1, checks + 1):
        step = 10 * number
        if replayed:
            yield _replay(step, number / checks)
        heights = {name: height * (0.955 + 0.03 * draw.random()) ** (40 / checks) for name, height in heights.items()}
        plan = MergePlan.decide(_readings(heights), gate=rule, method="linear", weights=WEIGHTS)
        yield check_entry(step, plan, 0.11 + 0.02 * draw.random())
        probed = number % max(1, checks // 8) == 0
        mean = sum(heights.values()) / len(heights)
        if probed:
            yield _probe(step, "before" if plan.selected else "every", min(0.97, 1.7 * mean), number / checks)
        if plan.selected:
            merges += 1
            for name in plan.selected:
                left[name] *= WEIGHTS[0]
                heights[name] += 0.1 + 0.12 * draw.random()
            edits = [Edit(name, 0.04 * draw.random(), 0.1 + 0.1 * draw.random()) for name in plan.selected]
            yield merge_entry(step, plan, edits, left, 0.35)
            if probed:
                yield _probe(step, "after", min(0.97, 1.7 * sum(heights.values()) / len(heights)), number / checks)
    yield _probe(10 * checks, "end", min(0.97, 1.7 * sum(heights.values()) / len(heights)), 1.0)
    counts = Progress(checks=checks, merges=merges, modules_merged=merges)
    spent = 0.12 * checks + 0.35 * merges + (_PASSES * checks if replayed else 0.0)
    yield end_entry(10 * checks, counts, spent, 24.0 * checks)


def _readings(heights: dict[str, float]) -> Readings:
    readings = []
    for name, cosine in heights.items():
        shape, null = TYPES.get(name.split(".", 2)[-1], ((4096, 4096), 0.2))
        cosine = min(cosine, 0.98)
        # A few standard deviations of an unrelated update either way.
        signed = 0.003 * (cosine - 0.44)
        reading = Reading(
            name, cosine, null, 1.2 - cosine, 16, shape, null_std=0.02, reference=0.6, signed_cosine=signed
        )
        readings.append(reading)
    return Readings(readings)


def _probe(step: int, when: str, refused: float, learned: float) -> dict[str, Any]:
    shares: dict[tuple[str, Kind, int], float] = {
        ("advbench_refused", "harm", 64): refused,
        ("benign_refused", "over_refusal", 32): 0.06 + 0.05 * refused,
        ("pubmedqa_accuracy", "task", 100): 0.45 + 0.3 * learned,
    }
    counts = {key: round(share * key[2]) for key, share in shares.items()}
    measures = [
        share_of(measure, "1" * count + "0" * (n - count), kind) for (measure, kind, n), count in counts.items()
    ]
    loss = as_share("eval_loss", "task", 2.1 - 0.8 * learned, 100)
    return probe_entry(step, when, Answers((*measures, loss), 21.5, 8.2))


def _replay(step: int, done: float) -> dict[str, Any]:
    """Ten rows since the entry before: the loss rises while the task is learned, and is brought down again."""
    draw = random.Random(step)
    harm, benign = (size * (0.2 + math.sin(math.pi * done**0.5)) * draw.uniform(0.8, 1.2) for size in (0.05, 0.02))
    figures = {"loss_harm": harm, "loss_benign": benign, "rows": 10.0, "interval": 1.0}
    norm, cosine = 9 * harm, 0.04 * draw.uniform(-1, 1) - 0.12 * (1 - done)
    return gradient_entry(step, "replay", TermReading(1.0, (harm + benign) / 2, 10, _PASSES, norm, cosine, figures))


def _start(rule: Gate, modules: int) -> dict[str, Any]:
    sources = {
        side: {
            "source": f"made-up-{side}",
            "revision": None,
            "files": ["model.safetensors"],
            "header_sha256": "0" * 64,
            "weights_sha256": digit * 64,
        }
        for side, digit in (("aligned", "a"), ("unaligned", "b"))
    }
    settings = {"gate": rule.name, "threshold": rule.threshold, "weights": list(WEIGHTS), "method": "linear"}
    name = "made-up.subspace.safetensors"
    config = {"subspace": name, "safety_adapter": "made-up/safety", **settings}
    versions = {"safemerge-callback": "made up"}
    return start_entry(0, config, versions, Sources(name, **sources), modules, world_size=1)


def main(args: Sequence[str] | None = None) -> None:
    """Write the journal and its page, and print where they are."""
    from safemerge_callback.reports import read_history, write_page

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the journal and the page go")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--checks", type=int, default=40)
    options = parser.parse_args(args)
    journal = write_example(options.folder, options.layers, checks=options.checks, replayed=True)
    print(write_page(read_history(journal), options.folder / "safemerge_report.html"))


if __name__ == "__main__":
    run_command(main)
