"""How long one safety probe takes: prompts asked of the live model in the middle of its training.

python -m benchmarks.safety_probe [--prompts 64] [--new-tokens 24] [--batch-size 32] [--repeats 3] [--output FILE.json]

Three quarters of the prompts are AdvBench's, the rest harmless. The model is the demo's (SmolLM2-135M-Instruct,
aligned) with a LoRA of rank 8 on q and v, not merged, in training mode, as a probe finds it; judging by keywords is
counted. `--model` takes any other. A first probe is not counted. The target is 64 prompts of 24 tokens in 25 s on 2
cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.hardware import device, hardware, timed, title

TARGET_SECONDS = 25.0


def sets(prompts: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return harmful and benign prompts, `prompts` together."""
    from recipes.data import load_prompts

    benign = max(1, prompts // 4)
    return {"advbench": load_prompts("advbench")[: prompts - benign]}, {"benign": load_prompts("benign")[:benign]}


def live_model(name: str) -> tuple[Any, Any]:
    """Return a model as it is while it trains, and its tokenizer."""
    from peft import LoraConfig, get_peft_model

    from recipes.models import load_model

    model, tokenizer = load_model(name)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, task_type="CAUSAL_LM")
    return get_peft_model(model, lora).to(device()).train(), tokenizer


def probe(model: Any, tokenizer: Any, prompts: int, new_tokens: int, batch_size: int) -> Any:
    """Return what asks the prompts once, and gives the answers."""
    from safemerge_callback.evaluation import KeywordJudge
    from safemerge_callback.evaluation.probe import Asking, Questions, ask

    questions = Questions.of(tokenizer, *sets(prompts))
    asking = Asking(KeywordJudge(), KeywordJudge(), max_new_tokens=new_tokens, batch_size=batch_size)
    return lambda: ask(model, tokenizer, questions, asking)


def measured(work: Any, repeats: int) -> dict[str, Any]:
    """Time the probe `repeats` times after one that is not counted."""
    work()
    taken = [timed(work) for _ in range(repeats)]
    seconds = [took for took, _ in taken]
    answers = taken[-1][1]
    said = answers.mean_tokens * sum(m["n"] or 0 for m in answers.measures if m["kind"] in ("harm", "over_refusal"))
    middle = statistics.median(seconds)
    rows = [dict(m) for m in answers.measures]
    return {
        "seconds": seconds,
        "median_seconds": middle,
        "tokens": said,
        "tokens_a_second": said / middle,
        "rows": rows,
    }


def report(results: dict[str, Any]) -> None:
    """Print the seconds beside the target, and what was measured on."""
    table = Table("prompts", "tokens each", "batch", "seconds (median, range)", "tokens/s", "target")
    about, seconds = results["about"], results["seconds"]
    spread = f"{results['median_seconds']:.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
    sizes = (str(about[key]) for key in ("prompts", "new_tokens", "batch_size"))
    table.add_row(*sizes, spread, f"{results['tokens_a_second']:.0f}", f"under {TARGET_SECONDS:g} s")
    console = Console()
    console.print(table)
    console.print(title(results["hardware"]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded-aligned")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    machine = hardware()
    model, tokenizer = live_model(options.model)
    work = probe(model, tokenizer, options.prompts, options.new_tokens, options.batch_size)
    about = {name: value for name, value in vars(options).items() if name != "output"}
    results = {"hardware": machine, "about": about, **measured(work, options.repeats)}
    report(results)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
