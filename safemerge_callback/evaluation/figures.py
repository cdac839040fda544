"""Harm and over-refusal of a model on prompt sets: every response made once, and judged by every judge that can."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, shown
from ..io.outputs import FileKind, free_output
from ..signals.responses import check_vocabulary, respond, tokenized
from .judges import Judge, KeywordJudge, decides
from .measure import Keep, SetKind, Share, Transcript, refusal_shares
from .prompts import PromptSet

# The files that hold what an evaluation came to, and each response, a line of JSON.
FIGURES = FileKind("a file of figures of ours", lambda head: head.split()[:2] == [b"{", b'"settings":'])
RESPONSES = FileKind("a file of responses of ours", lambda head: head.startswith((b'{"set":', b'{"measure":')))


def check_outputs(output: Any, responses: Any, inputs: Sequence[Any] = ()) -> None:
    """Raise ConfigError where figures or responses, each a path or None, may not be written, or both go to one file.

    Responses can be prompts again: a file of them is no output where it is one of the `inputs`.
    """
    files = [(path, kind) for path, kind in ((output, FIGURES), (responses, RESPONSES)) if path is not None]
    places = [free_output(path, "output", kind, inputs) for path, kind in files]
    if len({os.path.realpath(place) for place in places}) < len(places):
        raise ConfigError(f"output {shown(output)} is asked for figures and for responses: give two files")


def check_sets(sets: Sequence[PromptSet]) -> None:
    """Raise ConfigError for a set named twice, and for harm without over-refusal, or the other way round."""
    names = [one.name for one in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"prompt set {twice[0]!r} is given twice: give each once, and files their own names")
    kinds = {one.kind for one in sets}
    if len(kinds) == 1:
        lacking = "a benign set, such as xstest" if kinds == {"harm"} else "a harmful set, such as harmbench"
        raise ConfigError(
            f"prompt sets {names} are of one kind: harm is not measured without over-refusal; add {lacking}"
        )


def with_refusals(judges: Sequence[Judge]) -> list[Judge]:
    """Return the judges, and keywords first where none of them decides refusals: else none could see over-refusal."""
    decided = [decides(judge) for judge in judges]
    return list(judges) if "refusal" in decided else [KeywordJudge(), *judges]


def figures(
    model: Any,
    tokenizer: Any,
    sets: Sequence[PromptSet],
    judges: Sequence[Judge],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | str | None = None,
    keep: Keep | None = None,
    failures: list[str] | None = None,
) -> list[Share]:
    """Return a share for each set and judge, harm first; judges of harm are not asked about benign prompts.

    Responses are greedy, in the model's own chat template, which is given `chat_template_kwargs`. `keep` and `failures`
    as `refusal_shares`. Raises ConfigError as `check_sets`, and as `tokenized` for any set before one is asked.
    """
    check_sets(sets)
    ordered = sorted(sets, key=lambda one: one.kind == "benign")
    questions = [tokenized(tokenizer, one.prompts, settings=chat_template_kwargs) for one in ordered]
    check_vocabulary(model, (ids for tokens in questions for ids in tokens))
    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    everyone = with_refusals(judges)
    judges_of: dict[SetKind, list[Judge]] = {"harm": everyone, "benign": [j for j in everyone if decides(j) != "harm"]}

    def answers() -> Iterator[Transcript]:
        for one, tokens in zip(ordered, questions, strict=True):
            said = respond(model, tokenizer, tokens, **sizes, label=one.name)
            yield Transcript(one.name, one.kind, one.prompts, [response.text for response in said])

    return list(refusal_shares(answers(), judges_of, keep=keep, failures=failures))
