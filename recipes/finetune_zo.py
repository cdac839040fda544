"""Supervised fine-tuning of a LoRA adapter without a backward pass, with or without the safety callback.

    accelerate launch recipes/finetune_zo.py --config configs/finetune_zo/smollm2_sentiment_mezo.yaml
    python -m recipes.finetune_zo --config configs/finetune_zo/smollm2_sentiment_tezo.yaml --max_steps 10

Settings are those of recipes/finetune.py, and `zo_method`, `zo_epsilon` and `zo_rank`. A step takes two forward passes
a batch, and needs no memory for activations, gradients or Adam's moments of them; many more steps are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script by `accelerate launch`
    sys.path.insert(0, str(Path(__file__).parents[1]))

from recipes.arguments import SafeMergeArguments, parse, safemerge_config
from recipes.command import run_command
from recipes.finetune import DataArguments, build_trainer
from recipes.guarded_trainer import train

if TYPE_CHECKING:
    from trl import SFTTrainer


@dataclass
class ZerothOrderArguments:
    """How to train without gradients."""

    zo_method: str = field(
        default="mezo",
        metadata={"help": "mezo (a new direction a step) or tezo (low-rank ones of one family, with Adam)."},
    )
    zo_epsilon: float = field(default=1e-3, metadata={"help": "How far along the direction the loss is asked."})
    zo_rank: int = field(default=8, metadata={"help": "Of how many parts a direction of tezo is made."})


def parse_zo(args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse this recipe's settings: data, training, model, the callback's (None: no callback), and zeroth order's."""
    from trl import ModelConfig, SFTConfig

    from recipes.zeroth_order import ZerothOrderSettings

    classes = (DataArguments, SFTConfig, ModelConfig, SafeMergeArguments, ZerothOrderArguments)
    data, sft, model, guard, zo = parse(classes, args)
    settings = ZerothOrderSettings(zo.zo_method, zo.zo_epsilon, zo.zo_rank)
    return data, sft, model, safemerge_config(guard, data), settings


def build(args: Sequence[str] | None = None) -> SFTTrainer:
    """Return a trainer, ready to train, of a command line's words."""
    from recipes.zeroth_order import ZerothOrderTrainer

    data, sft, model, guard, settings = parse_zo(args)
    return build_trainer(data, sft, model, guard, trainer_class=partial(ZerothOrderTrainer, zeroth_order=settings))


def main(args: Sequence[str] | None = None) -> None:
    """Fine-tune as configured and save the adapter in `output_dir`."""
    train(build(args))


if __name__ == "__main__":
    run_command(main)
