"""Direct preference optimisation of a LoRA adapter, with or without the safety callback.

    accelerate launch recipes/dpo.py --config configs/dpo/smollm2_sentiment.yaml
    accelerate launch recipes/dpo.py --config configs/dpo/smollm2_sentiment_replay.yaml

Settings are those of TRL's DPOConfig and ModelConfig, and of recipes/finetune.py those of data, probe and callback.
`data` is a file or a data set of the Hub with prompt, chosen and rejected, or a task of the recipes, whose right
answers are chosen and wrong ones rejected. The reference is the model with the adapter off.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script by `accelerate launch`
    sys.path.insert(0, str(Path(__file__).parents[1]))

from recipes.arguments import SafeMergeArguments, TemplatedArguments, parse, safemerge_config
from recipes.command import run_command
from recipes.guarded_trainer import dataset_of, guarded_trainer, train

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer, ModelConfig

    from safemerge_callback.training import SafeMergeConfig

    Settings = tuple[TemplatedArguments, DPOConfig, ModelConfig, SafeMergeConfig | None]


def parse_dpo(args: Sequence[str] | None = None) -> Settings:
    """Parse this recipe's settings: data, training, model, and the callback's (None: no callback)."""
    from trl import DPOConfig, ModelConfig

    data, dpo, model, arguments = parse((TemplatedArguments, DPOConfig, ModelConfig, SafeMergeArguments), args)
    return data, dpo, model, safemerge_config(arguments, data)


def load_pairs(data: TemplatedArguments) -> Dataset:
    """Return the pairs as a dataset with TRL's columns `prompt`, `chosen` and `rejected`."""
    from recipes.data.mixture import training_rows
    from recipes.data.preferences import PAIR_FORM

    return dataset_of(data, training_rows(data, PAIR_FORM), ("prompt", "chosen", "rejected"), data.template)


def build_trainer(
    data: TemplatedArguments,
    dpo: DPOConfig,
    model_config: ModelConfig,
    safemerge: SafeMergeConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> DPOTrainer:
    """Return a trainer, ready to train: model, tokenizer, pairs, LoRA, and the safety callback if configured."""
    from trl import DPOTrainer

    pairs = load_pairs(data)
    how: dict[str, Any] = {"template": data.template, "callbacks": callbacks}
    return guarded_trainer(DPOTrainer, lambda *_: pairs, data, dpo, model_config, safemerge, **how)


def main(args: Sequence[str] | None = None) -> None:
    """Train as configured and save the adapter in `output_dir`."""
    train(build_trainer(*parse_dpo(args)))


if __name__ == "__main__":
    run_command(main)
