"""How often does a model refuse harmful prompts, refuse harmless ones, and answer its task rightly?

    python -m recipes.evaluate --config configs/evaluate/smollm2_aligned.yaml

Harm is never reported without over-refusal and utility, and no share without its 95 % interval. Responses may be
harmful: they are written only where `responses` names a file, and never printed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from recipes.data import load_examples, load_prompts
from safemerge_callback.adapters import load_adapter
from safemerge_callback.errors import ConfigError, nearest
from safemerge_callback.evaluation import Judge, KeywordJudge, Row, says, share

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HARMFUL = ("advbench", "strongreject", "harmbench")
# Tasks whose answers are one word; accuracy compares that word.
TASKS = ("sentiment", "pubmedqa")
# Sampling settings that a checkpoint brings along are put back to neutral, or transformers warns of each.
GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "pad_token_id": 0, "use_cache": True}
KEPT = ("measure", "prompt", "response", "verdict")
Keep = Callable[[str, Sequence[str], Sequence[str], Sequence[bool]], None]


@dataclass
class EvaluateArguments:
    """What to evaluate, on how much, and where the figures go."""

    model_name_or_path: str = field(metadata={"help": "`embedded`, `embedded-aligned`, a folder or a Hub id."})
    adapter: str | None = field(default=None, metadata={"help": "LoRA adapter on top: a folder or a Hub id."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})
    responses: str | None = field(default=None, metadata={"help": "JSON-lines file for prompts and responses."})
    n_prompts: int = field(default=32, metadata={"help": "Prompts of each harmful set (0: none)."})
    n_benign: int = field(default=48, metadata={"help": "Harmless prompts (0: none)."})
    n_task: int = field(default=200, metadata={"help": "Test rows of the task (0: none)."})
    task: str = field(default="sentiment", metadata={"help": "Task of one-word answers: sentiment or pubmedqa."})
    batch_size: int = field(default=32, metadata={"help": "Prompts a batch."})
    max_new_tokens: int = field(default=40, metadata={"help": "Tokens of a response that is judged."})
    dtype: str = field(default="float32", metadata={"help": "The model's dtype, or auto: as in its checkpoint."})


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    batch_size: int = 32,
    label: str = "generate",
) -> list[str]:
    """Return the model's greedy response to each prompt as a user's turn, in the order of `prompts`.

    Padding is masked, and a response ends at its first end-of-turn token, so neither the batch nor the padding token
    changes a response (up to the rounding of batched arithmetic). Training mode is as before afterwards.
    """
    from tqdm import tqdm

    tokens = _tokens(tokenizer, prompts) if prompts else []
    # Alike lengths together: little padding. The longest first, so that memory fails at once or not at all.
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    responses = [""] * len(tokens)
    ends = _end_tokens(model, tokenizer)
    with _evaluating(model):
        for start in tqdm(range(0, len(order), batch_size), desc=label, disable=None):
            batch = order[start : start + batch_size]
            new = _continue(model, [tokens[i] for i in batch], ends, max_new_tokens)
            for i, answer in zip(batch, new.tolist(), strict=True):
                stop = next((at for at, token in enumerate(answer) if token in ends), len(answer))
                responses[i] = tokenizer.decode(answer[:stop], skip_special_tokens=True).strip()
    return responses


def _tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template: evaluate a chat or instruct model")
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    # The template writes the special tokens itself.
    texts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def _continue(model: PreTrainedModel, tokens: list[list[int]], ends: list[int], max_new_tokens: int) -> Tensor:
    """Return the new token ids (batch, at most max_new_tokens) after `tokens`, padded on the left with id 0."""
    import torch
    from transformers import GenerationConfig

    longest = max(map(len, tokens))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in tokens], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in tokens], device=model.device)
    greedy = GenerationConfig(**GREEDY, max_new_tokens=max_new_tokens, eos_token_id=ends or None)
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)[:, longest:]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in evaluation mode, and afterwards each module back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def refusal_rate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    measure: str = "refused",
    judge: Judge | None = None,
    keep: Keep | None = None,
    max_new_tokens: int = 40,
    batch_size: int = 32,
) -> Row:
    """Return the share of prompts that the model refuses, by `judge` (default KeywordJudge).

    `keep(measure, prompts, responses, verdicts)` is called with all of them, if given.
    """
    judge = judge or KeywordJudge()
    said = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, label=measure)
    verdicts = [judge.refuses(prompt, response) for prompt, response in zip(prompts, said, strict=True)]
    if keep:
        keep(measure, prompts, said, verdicts)
    return share(measure, verdicts)


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, Any]],
    *,
    measure: str = "accuracy",
    keep: Keep | None = None,
    max_new_tokens: int = 3,
    batch_size: int = 32,
) -> Row:
    """Return the share of conversational rows whose one-word completion is the first word that the model says."""
    prompts = [row["prompt"][-1]["content"] for row in examples]
    said = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, label=measure)
    wanted = [row["completion"][0]["content"] for row in examples]
    verdicts = [says(word, response) for word, response in zip(wanted, said, strict=True)]
    if keep:
        keep(measure, prompts, said, verdicts)
    return share(measure, verdicts)


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_prompts: int = 32,
    n_benign: int = 48,
    n_task: int = 200,
    task: str = "sentiment",
    judge: Judge | None = None,
    keep: Keep | None = None,
    max_new_tokens: int = 40,
    batch_size: int = 32,
) -> list[Row]:
    """Return refusals of the three harmful sets and of harmless prompts, and accuracy on the task's test rows.

    Each takes the first so many of its set, in a fixed order; 0 leaves a measure out, a smaller set is taken whole.
    """
    if task not in TASKS:
        raise ConfigError(f"task {task!r} is unknown: choose one of {list(TASKS)}{nearest(task, TASKS)}")
    counts = dict.fromkeys(HARMFUL, n_prompts) | {"benign": n_benign}
    if min(n_prompts, n_benign, n_task) < 0:
        raise ConfigError(f"n_prompts, n_benign, n_task are {n_prompts}, {n_benign}, {n_task}: give 0 or more of each")
    options: dict[str, Any] = {"keep": keep, "batch_size": batch_size}
    judged: dict[str, Any] = {**options, "judge": judge, "max_new_tokens": max_new_tokens}
    asked = {name: load_prompts(name)[:count] for name, count in counts.items() if count}
    rows = [refusal_rate(model, tokenizer, asked[name], measure=f"{name}_refused", **judged) for name in asked]
    if n_task:
        test = load_examples(task, "test")[:n_task]
        rows.append(accuracy(model, tokenizer, test, measure=f"{task}_accuracy", **options))
    return rows


def load(arguments: EvaluateArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model with its adapter on the first accelerator, or on the CPU."""
    import torch

    from recipes.models import load_model

    model, tokenizer = load_model(arguments.model_name_or_path, dtype=arguments.dtype)
    if arguments.adapter:
        from peft import PeftModel

        # PEFT would fall back to a pickled file: this refuses it, and whatever else cannot be evaluated as a LoRA.
        load_adapter(arguments.adapter)
        model = PeftModel.from_pretrained(model, arguments.adapter)
    return model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer


def main(args: Sequence[str] | None = None) -> None:
    """Evaluate as configured: print the table, and write the files that the settings name."""
    from recipes.finetune import parse

    (arguments,) = parse((EvaluateArguments,), args)
    kept: list[Any] = []
    names = ("n_prompts", "n_benign", "n_task", "task", "max_new_tokens", "batch_size")
    model, tokenizer = load(arguments)
    rows = evaluate_model(
        model, tokenizer, keep=lambda *one: kept.append(one), **{name: getattr(arguments, name) for name in names}
    )
    print_rows(rows, " + ".join(filter(None, (arguments.model_name_or_path, arguments.adapter))))
    _write(arguments.output, json.dumps({"settings": asdict(arguments), "rows": rows}, indent=2))
    responses = [(measure, *row) for measure, *columns in kept for row in zip(*columns, strict=True)]
    _write(arguments.responses, "\n".join(json.dumps(dict(zip(KEPT, row, strict=True))) for row in responses))


def print_rows(rows: Sequence[Row], title: str) -> None:
    """Print the rows as a table of percentages."""
    table = Table("measure", "n", "share", "95 % interval", title=title)
    for row in rows:
        table.add_row(row["measure"], str(row["n"]), f"{row['value']:.1%}", f"{row['low']:.1%} to {row['high']:.1%}")
    Console().print(table)


def _write(path: str | None, text: str) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
