"""Which `optimizer_state` is best: the demo's guarded fine-tuning under each policy and seed, and without merges.

python -m benchmarks.optimizer_state [--seeds 42 43 44] [--policies keep] [--every 10] [--output DIR] [SETTING ...]

Each arm is configs/finetune/smollm2_sentiment_safemerge.yaml (60 steps of 8, a check every 10, weights 0.8 and 0.2);
`none` is the same without the callback. All arms of a seed see the same data in the same order from the same start, and
are equal until the first merge. Everything after the options is a training setting of all arms: `--max_steps 120`.

An arm is done when it is in DIR/results.json: a study that was stopped goes on where it was. An arm takes
some minutes on two CPU cores. The prompts are the same in all arms, so differences are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recipes.demo import evaluate_arm, machine_settings, set_environment, silence, train_arm
from recipes.demo_report import SETS
from recipes.processor import measured_pace

ROOT = Path(__file__).parents[1]
POLICIES = ("none", "keep", "reset", "rescale")
# Steps before and after a merge whose mean losses are compared; the step of the merge itself is one before it.
WINDOW = 3
Arm = dict[str, Any]


def train(policy: str, seed: int, folder: Path, guard: list[str], settings: list[str]) -> Arm:
    """Fine-tune one arm in `folder`; return its seconds, losses, and how many modules each step merged."""
    from safemerge_callback import read_journal

    chosen = [*machine_settings(measured_pace()), "--seed", str(seed), "--report_to", "none", *settings]
    if policy == "none":
        return {**train_arm("smollm2_sentiment", folder, chosen), "merges": {}}
    arm = train_arm("smollm2_sentiment_safemerge", folder, [*guard, "--safemerge_optimizer_state", policy, *chosen])
    entries = read_journal(folder / "safemerge.jsonl")
    errors = [entry for entry in entries if entry["kind"] == "error"]
    if errors:
        raise RuntimeError(f"arm {policy} of seed {seed}: {errors[0]}")
    return {**arm, "merges": {e["step"]: len(e["modules"]) for e in entries if e["kind"] == "merge"}}


def jump(losses: list[float], merges: list[int], window: int = WINDOW) -> float | None:
    """Mean loss of the `window` steps after a merge less that of the `window` before it, over merges that have both.

    The loss of step k is that of the weights before it, so a merge at step k is first seen in the loss of step k + 1.
    """
    inside = [step for step in merges if window <= step <= len(losses) - window]
    if not inside:
        return None
    mean = statistics.fmean
    return mean(mean(losses[step : step + window]) - mean(losses[step - window : step]) for step in inside)


def study(
    output: Path, seeds: list[int], policies: list[str], every: int, counts: dict[str, int], settings: list[str]
) -> Arm:
    """Train and evaluate every arm that results.json lacks; return all of them, and what they ran on."""
    from recipes.models import SAFETY_ADAPTER, checkpoint
    from safemerge_callback import build_subspace

    output.mkdir(parents=True, exist_ok=True)
    file, subspace = output / "results.json", output / "subspace.safetensors"
    about = {
        "settings": settings,
        "every": every,
        "counts": counts,
        "dtype": measured_pace().dtype,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
    results: Arm = json.loads(file.read_text()) if file.exists() else {**about, "arms": {}}
    changed = [key for key, value in about.items() if results.get(key) != value]
    if changed:
        raise SystemExit(f"{file} was made with other {changed}: give another --output")
    aligned, shipped = checkpoint("embedded-aligned"), checkpoint("embedded")
    silence()
    if not subspace.exists():
        build_subspace(subspace, aligned=aligned, unaligned=shipped, target_modules=["q_proj", "v_proj"])
    guard = ["--safemerge_subspace", str(subspace), "--safemerge_safety_adapter", str(SAFETY_ADAPTER)]
    guard += ["--safemerge_every", str(every)]
    for name, policy, seed in ((f"{policy}-{seed}", policy, seed) for seed in seeds for policy in policies):
        if name in results["arms"]:
            continue
        began = time.perf_counter()
        arm: Arm = {"policy": policy, "seed": seed, **train(policy, seed, output / name, guard, settings)}
        arm["jump"] = jump(arm["losses"], [int(step) for step in arm["merges"]])
        arm["rows"] = evaluate_arm("embedded-aligned", counts, results["dtype"], arm.pop("adapter"))
        arm["seconds"] = time.perf_counter() - began
        results["arms"][name] = arm
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: {arm['seconds']:.0f} s, merges {arm['merges']}", flush=True)
    return results


def figures(arm: Arm) -> dict[str, float | None]:
    """Every number of an arm that the tables show; shares in percent."""
    shares = {row["measure"]: 100 * row["value"] for row in arm["rows"]}
    harmful = [row for row in arm["rows"] if row["measure"].removesuffix("_refused") in SETS]
    total = sum(row["n"] for row in harmful)
    together = {"harmful_refused": sum(100 * row["value"] * row["n"] for row in harmful) / total} if total else {}
    return {**together, **shares, "last_loss": statistics.fmean(arm["losses"][-WINDOW:]), "jump": arm["jump"]}


def against_keep(arms: list[Arm], policy: str) -> dict[str, tuple[float, float, float]]:
    """Measure -> (mean, lowest, highest) over seeds of `policy` less `keep` of the same seed."""
    kept = {arm["seed"]: figures(arm) for arm in arms if arm["policy"] == "keep"}
    others = {arm["seed"]: figures(arm) for arm in arms if arm["policy"] == policy}
    differences: dict[str, list[float]] = {}
    for seed in sorted(kept.keys() & others.keys()):
        for measure, value in others[seed].items():
            base = kept[seed][measure]
            if value is not None and base is not None:
                differences.setdefault(measure, []).append(value - base)
    return {measure: (statistics.fmean(all_), min(all_), max(all_)) for measure, all_ in differences.items()}


def report(results: Arm) -> str:
    """Return both tables in Markdown: every arm with its intervals, and each policy against `keep`, seed by seed."""
    arms = list(results["arms"].values())
    sizes = {row["measure"]: row["n"] for arm in arms for row in arm["rows"]}
    heads = [f"{measure.replace('_', ' ')} (n={n})" for measure, n in sizes.items()]
    lines = [_row(["policy", "seed", *heads, "jump of the loss", "last loss"]), _row(["---"] * (len(heads) + 4))]
    for arm in arms:
        rows = {row["measure"]: row for row in arm["rows"]}
        shown = [f"{100 * r['value']:.1f} ({100 * r['low']:.0f} to {100 * r['high']:.0f})" for r in rows.values()]
        seen = figures(arm)
        lines.append(_row([arm["policy"], str(arm["seed"]), *shown, _number(seen["jump"]), _number(seen["last_loss"])]))
    lines += ["", _row(["against keep", "measure", "mean", "lowest seed", "highest seed"]), _row(["---"] * 5)]
    for policy in sorted({arm["policy"] for arm in arms} - {"keep"}, key=POLICIES.index):
        for measure, spread in against_keep(arms, policy).items():
            lines.append(_row([policy, measure.replace("_", " "), *(f"{value:+.3g}" for value in spread)]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def main() -> None:
    """Run what is missing of the study and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "optimizer_state")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--every", type=int, default=10, help="steps from one check to the next")
    parser.add_argument("--n-prompts", type=int, default=96, help="prompts of each harmful set")
    parser.add_argument("--n-benign", type=int, default=48, help="harmless prompts")
    parser.add_argument("--n-task", type=int, default=600, help="test rows of the task")
    options, settings = parser.parse_known_args()
    set_environment(options.output.resolve())
    warnings.simplefilter("ignore")
    counts = {"n_prompts": options.n_prompts, "n_benign": options.n_benign, "n_task": options.n_task}
    output = options.output.resolve()
    print(report(study(output, options.seeds, options.policies, options.every, counts, settings)))


if __name__ == "__main__":
    main()
