"""The measures of a cell: refusals, over-refusal, task score and coherence, each with its verdicts kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from recipes.data.splits import SETS, Split, prompts_of, rows_of
from recipes.data.tasks import get_task
from recipes.evaluate import generate
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import Judge, judged, load_judge, measure_name, wilson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Takes what a set's prompts were answered, in the order of the set.
Keep = Callable[[str, list[str]], None]
# A verdict's letter in `outcomes`; on the task, 1 is a right answer.
LETTERS = {"refused": "1", "complied": "0", "incoherent": "i", "unjudged": "u"}


class Measure(TypedDict):
    """A share, its 95 % Wilson interval, and each prompt's outcome in the order of its set.

    outcomes: a letter a prompt: 1 refused or right, 0 not, i incoherent (counted as not refused), u unjudged (left out
    of `n`).
    """

    measure: str
    n: int
    value: float
    low: float
    high: float
    outcomes: str


def evaluate_cell(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    split: Split,
    counts: Mapping[str, Any],
    keep: Keep | None = None,
) -> list[Measure]:
    """Return every measure of a model: `<set>_refused`, `task` and `coherent`; `counts` as `Grid.evaluate`.

    Each set takes the first so many prompts of the split. `coherent` is the share of all responses to prompts that are
    neither empty nor a loop (a proxy). A second judge's measures end in @ and its name. `keep` is given each set's
    responses.
    """
    judges = {name: load_judge(name) for name in counts["judges"]}
    options = {**_asking(counts), "max_new_tokens": counts["max_new_tokens"]}
    measures: list[Measure] = []
    looks: list[str] = []
    for name in SETS:
        prompts = prompts_of(name, split, counts[name])
        said = generate(model, tokenizer, prompts, label=name, **options)
        if keep:
            keep(name, said)
        for place, (which, judge) in enumerate(judges.items()):
            found = _judged(judge, name, prompts, said)
            measures.append({**found, "measure": found["measure"] + (f"@{which}" if place else "")})
            looks += [] if place else ["0" if letter == "i" else "1" for letter in found["outcomes"]]
    measures.append(_task_score(model, tokenizer, task, split, counts))
    return [*measures, share_of("coherent", "".join(looks))]


def _asking(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: counts.get(name) for name in ("batch_size", "chat_template_kwargs")}


def _judged(judge: Judge, name: str, prompts: Sequence[str], said: Sequence[str]) -> Measure:
    return share_of(measure_name(name, judge), "".join(LETTERS[verdict] for verdict in judged(judge, prompts, said)))


def _task_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, split: Split, counts: Mapping[str, Any]
) -> Measure:
    task = get_task(name)
    rows = rows_of(task, split, counts["task"])
    prompts = [row["prompt"][-1]["content"] for row in rows]
    options = {**_asking(counts), "max_new_tokens": task.max_new_tokens}
    said = generate(model, tokenizer, prompts, label=name, **options)
    right = [task.right(row["completion"][0]["content"], answer) for row, answer in zip(rows, said, strict=True)]
    return share_of("task", "".join("1" if each else "0" for each in right))


def share_of(measure: str, outcomes: str) -> Measure:
    """Return the share of 1 among outcomes that are not u; ConfigError where nothing is left to count."""
    n, held = len(outcomes) - outcomes.count("u"), outcomes.count("1")
    if not n:
        raise ConfigError(
            f"measure {measure!r}: no response has a verdict; look at the judge, or give more prompts, or more "
            "max_new_tokens to a model that thinks"
        )
    low, high = wilson(held, n)
    return Measure(measure=measure, n=n, value=held / n, low=low, high=high, outcomes=outcomes)


def load_merged(name: str, adapter: Path | None, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model with an adapter's update merged into its weights, on the accelerator or the CPU, and tokenizer."""
    import torch

    from recipes.models import load_model

    model, tokenizer = load_model(name)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device, getattr(torch, dtype)), tokenizer
