"""Train a safety LoRA: SFT on (harmful prompt, refusal) and (benign prompt, answer) pairs, kept in float16.

    accelerate launch recipes/train_safety_adapter.py --config configs/train_safety_adapter/smollm2_alignment.yaml
    accelerate launch recipes/train_safety_adapter.py --config configs/train_safety_adapter/smollm2_safety.yaml
    accelerate launch recipes/train_safety_adapter.py --config configs/train_safety_adapter/smollm2_safety_booster.yaml

Trained once on the aligned model, it serves every fine-tune of that model (SafeMERGE, arXiv:2503.17239, section 3.2).
The output folder holds a plain PEFT adapter and a README.md with the command that made it. `safemerge_corrections` is a
list as in recipes/finetune.py: what hardens the adapter while it is trained stands there.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script by `accelerate launch`
    sys.path.insert(0, str(Path(__file__).parents[1]))

from recipes.arguments import SafeMergeArguments, parse, safemerge_config
from recipes.command import run_command
from recipes.finetune import DataArguments, build_trainer

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig, SFTTrainer

    from safemerge_callback.training import SafeMergeConfig

    Settings = tuple[DataArguments, SFTConfig, ModelConfig, "AdapterArguments", SafeMergeConfig | None]


@dataclass
class AdapterArguments:
    """What the adapter's files say about it."""

    base_model_name: str | None = field(
        default=None, metadata={"help": "Name of the base model in adapter_config.json, instead of a folder's path."}
    )
    description: str = field(default="", metadata={"help": "One sentence for the adapter's README.md."})


def parse_train(args: Sequence[str] | None = None) -> Settings:
    """Parse this recipe's settings: data, training, model, what to write about the adapter, and the callback's."""
    from trl import ModelConfig, SFTConfig

    classes = (DataArguments, SFTConfig, ModelConfig, AdapterArguments, SafeMergeArguments)
    data, sft, model, about, arguments = parse(classes, args)
    return data, sft, model, about, safemerge_config(arguments, data)


def save_adapter_float16(trainer: SFTTrainer, folder: Path, base_model_name: str | None) -> None:
    """Write the trained adapter in `folder` as float16, under a base name that holds on any machine.

    Every process calls it, since gathering a sharded adapter takes all of them; the first one writes.
    """
    import torch
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as aside:
        trainer.save_model(aside)
        if not trainer.is_world_process_zero():
            return
        trained = load_file(Path(aside) / "adapter_model.safetensors")
        config: dict[str, Any] = json.loads((Path(aside) / "adapter_config.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(torch.float16) for name, weight in trained.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config["base_model_name_or_path"] = base_model_name or config["base_model_name_or_path"]
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def card(command: str, examples: int, settings: Settings) -> str:
    """Return the adapter's README.md."""
    data, sft, model, about, _ = settings
    batch = sft.per_device_train_batch_size * sft.gradient_accumulation_steps
    length = f"{sft.max_steps} steps" if sft.max_steps > 0 else f"{sft.num_train_epochs:g} epochs"
    versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in ("torch", "transformers", "trl", "peft"))
    return f"""---
base_model: {about.base_model_name or model.model_name_or_path}
library_name: peft
license: apache-2.0
---

# {Path(sft.output_dir).name}

{about.description}

Made by

    {command}

on the model `{model.model_name_or_path}` with the data `{data.data}` ({examples} examples): rank {model.lora_r}, alpha
{model.lora_alpha}, on {", ".join(model.lora_target_modules or [])}; {length} of {batch},
learning rate {sft.learning_rate:g}, seed {sft.seed}.
Stored as float16 safetensors. {versions}.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Train as configured and write the adapter with its README.md in `output_dir`."""
    words = list(sys.argv[1:] if args is None else args)
    settings = parse_train(args)
    data, sft, model_config, about, safemerge = settings
    trainer = build_trainer(data, sft, model_config, safemerge)
    trainer.train()
    folder = Path(sft.output_dir)
    save_adapter_float16(trainer, folder, about.base_model_name)
    if trainer.is_world_process_zero():
        command = " ".join(["accelerate launch recipes/train_safety_adapter.py", *words])
        (folder / "README.md").write_text(card(command, len(trainer.train_dataset), settings))
    trainer.accelerator.print(f"adapter saved in {folder}")


if __name__ == "__main__":
    run_command(main)
