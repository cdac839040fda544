"""What a training step takes of memory beside the model: AdamW against MeZO and TeZO, of a LoRA and of all weights.

python -m benchmarks.zeroth_order [--hidden 576] [--layers 30] [--batch 8] [--length 128] [--output FILE.json]

A Llama of random weights, by default with the shapes of SmolLM2-135M, and one step of each optimizer from its start:
the most bytes held at once above the model's own, so activations, gradients, moments, and zeroth order's copies; and
the seconds of a step after it. All in one process, one after the other, each on a model of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.hardware import device, extra_bytes, hardware, timed, title
from recipes.zeroth_order import METHODS, Directions, ZerothOrder

VOCABULARY = 49_152
ADAMW = "adamw"


def model_of(hidden: int, layers: int, *, lora: bool) -> Any:
    """Return a Llama of random weights, with a LoRA of rank 8 on q_proj and v_proj or all of it trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = hidden // 64
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 8 // 3, "num_hidden_layers": layers}
    kinds = {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 3), "tie_word_embeddings": True}
    if heads % kinds["num_key_value_heads"]:
        kinds["num_key_value_heads"] = heads
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **kinds)).to(device())
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"])) if lora else model


def step_of(model: Any, method: str, ids: torch.Tensor) -> Callable[[], None]:
    """Return what makes one step of an optimizer, new to the model."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    if method == ADAMW:
        adamw = torch.optim.AdamW([parameter for _, parameter in trained], lr=1e-5)

        def by_gradient() -> None:
            loss().backward()
            adamw.step()
            adamw.zero_grad()

        return by_gradient
    zeroth = ZerothOrder(trained, 1e-6, directions=Directions(method))

    def by_slope() -> None:
        zeroth.probe(loss, 0)
        zeroth.step()

    return by_slope


def measure(hidden: int, layers: int, batch: int, length: int) -> list[dict[str, Any]]:
    """Return a row for each kind of training and optimizer: bytes, seconds, and both over AdamW's."""
    rows: list[dict[str, Any]] = []
    for trained in ("lora", "all"):
        for method in (ADAMW, *METHODS):
            torch.manual_seed(0)
            model = model_of(hidden, layers, lora=trained == "lora").train()
            ids = torch.randint(VOCABULARY, (batch, length), device=device())
            step = step_of(model, method, ids)
            row: dict[str, Any] = {
                "trained": trained,
                "method": method,
                "bytes": extra_bytes(step),
                "seconds": timed(step)[0],
            }
            first = next((r for r in rows if r["trained"] == trained), row)
            rows.append(row | {f"{key}_share": row[key] / first[key] for key in ("bytes", "seconds")})
            del model, step
    return rows


def report(results: dict[str, Any]) -> None:
    """Print a row each."""
    table = Table("trained", "step", "MiB beside the model", "of AdamW's", "seconds", "of AdamW's")
    for row in results["rows"]:
        of_adamw = [f"{row[f'{key}_share']:.2f}" for key in ("bytes", "seconds")]
        numbers = (f"{row['bytes'] / 2**20:,.0f}", of_adamw[0], f"{row['seconds']:.2f}", of_adamw[1])
        table.add_row(row["trained"], row["method"], *numbers)
    console = Console()
    console.print(title(results["hardware"]))
    console.print(f"hidden {results['hidden']}, {results['layers']} layers, {results['batch']} x {results['length']}")
    console.print(table)


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("hidden", 576), ("layers", 30), ("batch", 8), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    sizes = vars(parser.parse_args())
    output = sizes.pop("output")
    results = {"hardware": hardware(), **sizes, "rows": measure(**sizes)}
    report(results)
    if output:
        output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
