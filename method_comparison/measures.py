"""The measures of a cell: refusals, over-refusal, task score and coherence, each with its verdicts kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.data.splits import SETS, Split, prompts_of, rows_of
from recipes.data.tasks import get_task
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import Judge, Share, Transcript, load_judge, refusal_shares
from safemerge_callback.evaluation.measure import SetKind, coherence, share_of
from safemerge_callback.signals import generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Takes what a set's prompts were answered, in the order of the set.
Keep = Callable[[str, list[str]], None]
# What a cell's result holds of each.
COLUMNS = ("measure", "n", "value", "low", "high", "outcomes")


def evaluate_cell(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    split: Split,
    counts: Mapping[str, Any],
    keep: Keep | None = None,
) -> list[Share]:
    """Return every measure of a model: `<set>_refused`, `task` and `coherent`; `counts` as `Grid.evaluate`.

    Each set takes the first so many prompts of the split. `coherent` is the share of all responses to prompts that are
    neither empty nor a loop (a proxy). A second judge's measures end in @ and its name. `keep` is given each set's
    responses.
    """
    judges = {name: load_judge(name) for name in counts["judges"]}
    everyone: dict[SetKind, list[Judge]] = {"harm": list(judges.values()), "benign": list(judges.values())}
    options = {**_asking(counts), "max_new_tokens": counts["max_new_tokens"]}

    def answers() -> Iterator[Transcript]:
        for name in SETS:
            prompts = prompts_of(name, split, counts[name])
            said = generate(model, tokenizer, prompts, label=name, **options)
            if keep:
                keep(name, said)
            yield Transcript(name, "benign" if name == "benign" else "harm", prompts, said)

    shares = [counted(one) for one in refusal_shares(answers(), everyone)]
    second = ["", *(f"@{name}" for name in list(judges)[1:])] * len(SETS)
    named: list[Share] = [{**one, "measure": one["measure"] + more} for one, more in zip(shares, second, strict=True)]
    return [
        *named,
        _task_score(model, tokenizer, task, split, counts),
        counted(coherence(shares[:: len(judges)], "coherent")),
    ]


def _asking(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: counts.get(name) for name in ("batch_size", "chat_template_kwargs")}


def _task_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, split: Split, counts: Mapping[str, Any]
) -> Share:
    task = get_task(name)
    rows = rows_of(task, split, counts["task"])
    prompts = [row["prompt"][-1]["content"] for row in rows]
    options = {**_asking(counts), "max_new_tokens": task.max_new_tokens}
    said = generate(model, tokenizer, prompts, label=name, **options)
    right = [task.right(row["completion"][0]["content"], answer) for row, answer in zip(rows, said, strict=True)]
    return counted(share_of("task", "".join("1" if each else "0" for each in right), "task"))


def counted(share: Share) -> Share:
    """Return the share; ConfigError where nothing is left to count."""
    if not share["n"]:
        raise ConfigError(
            f"measure {share['measure']!r}: no response has a verdict; look at the judge, or give more prompts, or "
            "more max_new_tokens to a model that thinks"
        )
    return share


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
