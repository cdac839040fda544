"""GRPO of a LoRA adapter, rewarded where the model's answer is right, with or without the safety callback.

    accelerate launch recipes/grpo.py --config configs/grpo/smollm2_sentiment.yaml
    accelerate launch recipes/grpo.py --config configs/grpo/smollm2_sentiment_replay.yaml

Settings are those of TRL's GRPOConfig and ModelConfig, of recipes/finetune.py those of data, probe and callback, and
`answer_check`: when an answer is right. A task of the recipes knows that; rows of one's own, a question with its right
answer in the columns of docs/own_data.md, need it said.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script by `accelerate launch`
    sys.path.insert(0, str(Path(__file__).parents[1]))

from recipes.arguments import ExampleArguments, SafeMergeArguments, parse, safemerge_config
from recipes.command import run_command
from recipes.data.tasks import CHECKS, TASKS
from recipes.guarded_trainer import dataset_of, guarded_trainer, train
from safemerge_callback.errors import ConfigError, shown
from safemerge_callback.io.choices import one_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, ModelConfig

    from safemerge_callback.training import SafeMergeConfig

    Settings = tuple["RewardArguments", GRPOConfig, ModelConfig, SafeMergeConfig | None]


CHECKABLE = "word needs one word, number an integer, name words without digits; write the answers so"


@dataclass
class RewardArguments(ExampleArguments):
    """Which questions to train on, and when an answer to one is right."""

    answer_check: str | None = field(
        default=None,
        metadata={"help": "word, number or name, which the answer gives; without it as the task that is trained on."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer_check is not None:
            one_of(self.answer_check, tuple(CHECKS), "answer_check")
        elif self.data not in TASKS:
            raise ConfigError(
                f"answer_check is not set, and {self.data or 'a mixture'!r} says nothing of when an answer is right: "
                f"choose among {', '.join(CHECKS)}"
            )

    @property
    def right(self) -> Callable[[str, str], bool]:
        """Whether a response, the second, gives the answer that is wanted, the first."""
        return TASKS[self.data].right if self.answer_check is None else CHECKS[self.answer_check]


def parse_grpo(args: Sequence[str] | None = None) -> Settings:
    """Parse this recipe's settings: data, training, model, and the callback's (None: no callback)."""
    from trl import GRPOConfig, ModelConfig

    data, grpo, model, arguments = parse((RewardArguments, GRPOConfig, ModelConfig, SafeMergeArguments), args)
    return data, grpo, model, safemerge_config(arguments, data)


def load_questions(data: RewardArguments) -> Dataset:
    """Return the questions as a dataset with TRL's column `prompt`, and `answer`, which the reward reads.

    ConfigError for an answer that the check would not find in itself.
    """
    from recipes.data import EXAMPLE_FORM
    from recipes.data.mixture import training_rows

    rows = training_rows(data, EXAMPLE_FORM)
    questions = [{"prompt": row["prompt"], "answer": row["completion"][0]["content"]} for row in rows]
    for at, question in enumerate(questions, 1):
        if not recognised(data.right, answer := question["answer"]):
            raise ConfigError(
                f"row {at} of the data has the answer {shown(answer)}, which answer_check {data.answer_check!r} would "
                f"find in no response: {CHECKABLE}"
            )
    return dataset_of(data, questions, ("prompt", "answer"))


def recognised(right: Callable[[str, str], bool], answer: str) -> bool:
    """Whether a check finds an answer in a response that is the answer and nothing else."""
    try:
        return right(answer, answer)
    except ValueError:
        return False


def answer_reward(right: Callable[[str, str], bool]) -> Callable[..., list[float]]:
    """Return a reward for TRL: 1 where a completion, as turns, gives the `answer` of its row, else 0."""

    def right_answer(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
        said = [turns[-1]["content"] for turns in completions]
        return [float(right(wanted, response)) for wanted, response in zip(answer, said, strict=True)]

    return right_answer


def build_trainer(
    data: RewardArguments,
    grpo: GRPOConfig,
    model_config: ModelConfig,
    safemerge: SafeMergeConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> GRPOTrainer:
    """Return a trainer, ready to train: model, tokenizer, questions, LoRA, and the callback if configured."""
    from trl import GRPOTrainer

    questions = load_questions(data)
    kind = partial(GRPOTrainer, reward_funcs=answer_reward(data.right))
    how: dict[str, Any] = {"template": grpo.chat_template_kwargs, "callbacks": callbacks}
    return guarded_trainer(kind, lambda *_: questions, data, grpo, model_config, safemerge, **how)


def main(args: Sequence[str] | None = None) -> None:
    """Train as configured and save the adapter in `output_dir`."""
    train(build_trainer(*parse_grpo(args)))


if __name__ == "__main__":
    run_command(main)
