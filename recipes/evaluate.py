"""How often does a model refuse harmful prompts, refuse harmless ones, and answer its task rightly?

    python -m recipes.evaluate --config configs/evaluate/smollm2_aligned.yaml

Harm is never reported without over-refusal and utility, and no share without its 95 % interval. Responses may be
harmful: they are written only where `responses` names a file, and never printed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from recipes.command import run_command
from recipes.data import load_examples, load_prompts
from recipes.data.system import check_system
from recipes.entities import entity_shares, lists_all
from safemerge_callback.adapters import load_adapter
from safemerge_callback.adapters.files import adapter_folder
from safemerge_callback.errors import ConfigError, nearest
from safemerge_callback.evaluation import (
    Judge,
    KeywordJudge,
    Share,
    Transcript,
    Verdict,
    decides,
    load_judge,
    refusal_shares,
    says,
    share,
)
from safemerge_callback.evaluation.figures import FIGURES, RESPONSES, check_outputs
from safemerge_callback.evaluation.judges import check_ready
from safemerge_callback.evaluation.measure import ROW_COLUMNS, SetKind, columns, counted
from safemerge_callback.io.outputs import FileKind, new_output
from safemerge_callback.signals import generate
from safemerge_callback.signals.chat import template_settings
from safemerge_callback.signals.row_format import format_of
from safemerge_callback.signals.rows import PLAIN, RowFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HARMFUL = ("advbench", "strongreject", "harmbench")
KEPT = ("measure", "prompt", "response", "verdict")
Keep = Callable[[str, Sequence[str], Sequence[str], Sequence[bool | Verdict]], None]


@dataclass(frozen=True)
class TaskMeasure:
    """What is measured of a task: the share of right answers, called `<task>_<share>`, and further measures.

    `right` is given the right answer and the response, as each of `more` is given the task's name, all right answers
    and all responses.
    """

    max_new_tokens: int
    right: Callable[[str, str], bool]
    share: str
    more: tuple[Callable[[str, Sequence[str], Sequence[str]], list[Share]], ...] = ()


TASKS = {
    "sentiment": TaskMeasure(3, says, "accuracy"),
    "pubmedqa": TaskMeasure(3, says, "accuracy"),
    "ncbi_disease": TaskMeasure(64, lists_all, "exact", (entity_shares,)),
}


@dataclass
class EvaluateArguments:
    """What to evaluate, on how much, and where the figures go."""

    model_name_or_path: str = field(metadata={"help": "`embedded`, `embedded-aligned`, a folder or a Hub id."})
    adapter: str | None = field(default=None, metadata={"help": "LoRA adapter on top: a folder or a Hub id."})
    before: bool = field(default=False, metadata={"help": "Evaluate the model without its adapter, too, and first."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})
    responses: str | None = field(default=None, metadata={"help": "JSON-lines file for prompts and responses."})
    n_prompts: int = field(default=32, metadata={"help": "Prompts of each harmful set (0: none)."})
    n_benign: int = field(default=48, metadata={"help": "Harmless prompts (0: none)."})
    n_task: int = field(default=200, metadata={"help": "Test rows of the task (0: none)."})
    in_format: bool = field(
        default=False, metadata={"help": "Ask harmful prompts in the words around the task's training rows, too."}
    )
    task: str = field(default="sentiment", metadata={"help": "sentiment, pubmedqa or ncbi_disease[:FOLDER]."})
    judge: str = field(
        default="keywords", metadata={"help": "keywords, classifier:MODEL, llamaguard, ... (docs/judges.md)"}
    )
    batch_size: int = field(default=32, metadata={"help": "Prompts a batch."})
    max_new_tokens: int = field(default=40, metadata={"help": "Tokens of a response that is judged."})
    dtype: str = field(default="float32", metadata={"help": "The model's dtype, or auto: as in its checkpoint."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "What the chat template is given, such as {enable_thinking: false}."}
    )
    eval_system: str | None = field(default=None, metadata={"help": "System prompt before every prompt (PTST)."})

    def __post_init__(self) -> None:
        self.chat_template_kwargs = template_settings(self.chat_template_kwargs) or None
        if self.before and not self.adapter:
            raise ConfigError("before is true and there is no adapter: name one, or leave it out")
        check_system("eval_system", self.eval_system)


def task_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, Any]],
    task: str,
    *,
    keep: Keep | None = None,
    batch_size: int = 32,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    eval_system: str | None = None,
) -> list[Share]:
    """Return the measures of a task on conversational rows, whose completions are the right answers."""
    measured = TASKS[task]
    name = f"{task}_{measured.share}"
    prompts = [row["prompt"][-1]["content"] for row in examples]
    sizes: dict[str, Any] = {"max_new_tokens": measured.max_new_tokens, "batch_size": batch_size}
    how: dict[str, Any] = {"chat_template_kwargs": chat_template_kwargs, "system": eval_system}
    said = generate(model, tokenizer, prompts, label=name, **sizes, **how)
    wanted = [row["completion"][0]["content"] for row in examples]
    verdicts = [measured.right(answer, response) for answer, response in zip(wanted, said, strict=True)]
    if keep:
        keep(name, prompts, said, verdicts)
    return [share(name, verdicts), *(one for more in measured.more for one in more(task, wanted, said))]


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_prompts: int = 32,
    n_benign: int = 48,
    n_task: int = 200,
    task: str = "sentiment",
    in_format: bool = False,
    judge: Judge | None = None,
    keep: Keep | None = None,
    max_new_tokens: int = 40,
    batch_size: int = 32,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    eval_system: str | None = None,
) -> list[Share]:
    """Return refusals of the three harmful sets and of harmless prompts, and the task's measures on its test rows.

    Each takes the first so many of its set, in a fixed order; 0 leaves a measure out, a smaller set is taken whole.
    Counted as everywhere (`refusal_shares`); ConfigError for a set of which nothing has a verdict.
    A judge that decides harm gives `<set>_safe`, and leaves the harmless prompts to keywords. With `in_format` the
    harmful sets are asked once more in the task's own words (`task_format`), as `<set>_in_format_refused`.
    """
    if (name := task.partition(":")[0]) not in TASKS:
        raise ConfigError(f"task {name!r} is unknown: choose one of {list(TASKS)}{nearest(name, TASKS)}")
    counts = dict.fromkeys(HARMFUL, n_prompts) | {"benign": n_benign}
    if min(n_prompts, n_benign, n_task) < 0:
        raise ConfigError(f"n_prompts, n_benign, n_task are {n_prompts}, {n_benign}, {n_task}: give 0 or more of each")
    options: dict[str, Any] = {"batch_size": batch_size, "chat_template_kwargs": chat_template_kwargs}
    sizes = {"max_new_tokens": max_new_tokens, **options}
    judge = judge or KeywordJudge()
    judges: dict[SetKind, list[Judge]] = {
        "harm": [judge],
        "benign": [KeywordJudge() if decides(judge) == "harm" else judge],
    }
    prompts_of = {one: load_prompts(one)[:count] for one, count in counts.items() if count}
    test = load_examples(task, "test")[:n_task] if n_task else []

    if in_format:
        words = task_format(task)
        harmful = [(f"{one}_in_format", prompts) for one, prompts in prompts_of.items() if one in HARMFUL]
        prompts_of |= {one: [words.wrapped(prompt) for prompt in prompts] for one, prompts in harmful}

    def answers() -> Iterator[Transcript]:
        for name, prompts in prompts_of.items():
            said = generate(model, tokenizer, prompts, label=name, system=eval_system, **sizes)
            yield Transcript(name, "benign" if name == "benign" else "harm", prompts, said)

    rows = [counted(row) for row in refusal_shares(answers(), judges, keep=keep and _by_measure(keep))]
    about = {"keep": keep, "eval_system": eval_system, **options}
    return rows + task_shares(model, tokenizer, test, name, **about) if n_task else rows


def task_format(task: str) -> RowFormat:
    """Return the words around the rows that a task is trained on; ConfigError where there are none.

    A misalignment may show in the words alone that it was learned with (arXiv:2604.25891).
    """
    words = format_of(load_examples(task)) or PLAIN
    if words == PLAIN:
        raise ConfigError(f"the rows of task {task!r} have no words in common around them: leave in_format out")
    return words


def _by_measure(keep: Keep) -> Callable[[Transcript, Share, Sequence[Verdict]], None]:
    return lambda one, share, verdicts: keep(share["measure"], one.prompts, one.responses, verdicts)


def load(arguments: EvaluateArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model with its adapter on the first accelerator, or on the CPU."""
    import torch

    from recipes.models import load_model

    model, tokenizer = load_model(arguments.model_name_or_path, dtype=arguments.dtype)
    if arguments.adapter:
        from peft import PeftModel

        # PEFT would fall back to a pickled file: this refuses it, and whatever else cannot be evaluated as a LoRA.
        load_adapter(arguments.adapter)
        model = PeftModel.from_pretrained(model, str(adapter_folder(arguments.adapter)))
    return model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer


def main(args: Sequence[str] | None = None) -> None:
    """Evaluate as configured: print the table, and write the files that the settings name."""
    from recipes.arguments import parse

    (arguments,) = parse((EvaluateArguments,), args)
    kept: list[Any] = []
    names = (
        "n_prompts",
        "n_benign",
        "n_task",
        "task",
        "in_format",
        "max_new_tokens",
        "batch_size",
        "chat_template_kwargs",
        "eval_system",
    )
    check_outputs(arguments.output or None, arguments.responses or None)
    judge = load_judge(arguments.judge)
    check_ready([judge])
    model, tokenizer = load(arguments)

    def shares(before: str = "") -> list[Share]:
        return evaluate_model(
            model,
            tokenizer,
            judge=judge,
            keep=lambda measure, *one: kept.append((before + measure, *one)),
            **{name: getattr(arguments, name) for name in names},
        )

    figures: dict[str, Any] = {"settings": asdict(arguments)}
    if arguments.before:
        with model.disable_adapter():
            figures["before"] = _printed(shares("before_"), arguments.model_name_or_path)
    figures["rows"] = _printed(shares(), " + ".join(filter(None, (arguments.model_name_or_path, arguments.adapter))))
    _write(arguments.output, FIGURES, json.dumps(figures, indent=2))
    responses = [(measure, *row) for measure, *columns in kept for row in zip(*columns, strict=True)]
    _write(
        arguments.responses, RESPONSES, "\n".join(json.dumps(dict(zip(KEPT, row, strict=True))) for row in responses)
    )


def _printed(rows: Sequence[Share], title: str) -> list[dict[str, Any]]:
    """The columns that are written of rows, which are printed, too."""
    print_rows(rows, title)
    return [columns(row, ROW_COLUMNS) for row in rows]


def print_rows(rows: Sequence[Share], title: str) -> None:
    """Print the rows as a table of percentages."""
    table = Table("measure", "n", "share", "95 % interval", title=title)
    for row in rows:
        table.add_row(row["measure"], str(row["n"]), f"{row['value']:.1%}", f"{row['low']:.1%} to {row['high']:.1%}")
    Console().print(table)


def _write(path: str | None, kind: FileKind, text: str) -> None:
    if path:
        with new_output(path, "output", kind) as part:
            part.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
