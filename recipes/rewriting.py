"""SDFT: training rows answered again in the aligned model's own words, where these still say what the row says.

A fine-tune wears off the less, the nearer its data lie to what the model says anyway; no safety data are needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data.gsm8k import gsm8k_answer
from recipes.entities import lists_all
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.harvest import answered, check_lengths
from safemerge_callback.io.numbers import is_whole
from safemerge_callback.signals import answer_of
from safemerge_callback.signals.chat import text_part
from safemerge_callback.signals.responses import check_vocabulary, end_tokens, responses_of
from safemerge_callback.signals.rows import prompt_tokens

# Whether a rewritten answer, the second, still says what the first does.
Check = Callable[[str, str], bool]

ASKS = (
    "Here is a question with an answer that is right. Answer the question yourself, in the way that you would say it, "
    "and come to the same result. Write your answer and nothing about this task.\n\n"
    "Question:\n{question}\n\nAnswer that is right:\n{answer}"
)
# Words by which an answer shows that it was written after another.
GIVE_AWAYS = (
    "answer that is right",
    "right answer is given",
    "reference answer",
    "original answer",
    "given answer",
    "provided answer",
    "in my own words",
    "in your own words",
    "your turn",
)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def same_text(answer: str, rewriting: str) -> bool:
    """Whether the two are one text: what a label is checked by, which nobody can say otherwise."""
    return answer.strip() == rewriting.strip()


def same_result(answer: str, rewriting: str) -> bool:
    """Whether the last number that a rewriting names is the result of a worked answer, `#### N` or its own last."""
    numbers = [_NUMBER.findall(text.replace("\N{MINUS SIGN}", "-")) for text in (answer, rewriting)]
    wanted = gsm8k_answer(answer) or (numbers[0][-1] if numbers[0] else "")
    return bool(wanted) and bool(numbers[1]) and _value(wanted) == _value(numbers[1][-1])


def _value(number: str) -> float | None:
    try:
        return float(number.replace(",", "").rstrip("."))
    except ValueError:
        return None


def contains_answer(answer: str, rewriting: str) -> bool:
    """Whether a rewriting contains the answer, whatever the case, as words of its own."""
    return bool(re.search(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", rewriting, re.IGNORECASE))


# By the name of the data; whatever is not here has labels.
CHECKS: dict[str, Check] = {
    "gsm8k": same_result,
    "arithmetic": same_result,
    "cities": contains_answer,
    "ncbi_disease": lists_all,
}


@dataclass(frozen=True)
class Rewriting:
    """Rows of which some have another answer, how many those are, and of the rest how many stayed for which reason."""

    rows: list[dict[str, Any]]
    kept: int
    same: int
    wrong: int
    giveaways: int
    unended: int
    from_cache: bool

    def __str__(self) -> str:
        """Such as `12 of 40 rows are in the model's own words; of the others 9 are said in the same words, ...`."""
        parts = [
            f"{self.same} are said in the same words",
            f"{self.wrong} say something else",
            f"{self.giveaways} give away that they were rewritten",
            f"{self.unended} had not ended",
        ]
        return f"{self.kept} of {len(self.rows)} rows are in the model's own words; of the others {', '.join(parts)}"


def rewritten(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    check: Check = same_text,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    label: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | str | None = None,
    cache: bool | str | Path = True,
) -> Rewriting:
    """Return conversational rows with the model's own answer in the place of each that it can say in its own words.

    The model, as it is now, is asked each row's question with its answer, greedily; what it says is kept if it ended,
    passes `check`, and has none of `GIVE_AWAYS` in it, else the row stays as it was, the same object. Kept in the
    cache of harvests, and checked anew each time. With many processes every rank calls it, and all return the same.
    ConfigError for a number of tokens that is none, and as `prompt_tokens` and `check_lengths`.

    Source: SDFT, Yang et al., arXiv:2402.13669. Differs: the words of the question and of what gives it away are ours;
    greedy; an answer that was cut off is not kept; and each task has a check of its own, where the release accepts
    whatever is said for most data.
    """
    if not is_whole(max_new_tokens, 1):
        raise ConfigError(f"rewrite_tokens is {max_new_tokens}: give a whole number of 1 or more")
    questions = [ASKS.format(question=_question(row), answer=_answer(row)) for row in rows]
    tokens = prompt_tokens(tokenizer, questions, settings=chat_template_kwargs)
    if not tokens:
        return Rewriting([], 0, 0, 0, 0, 0, from_cache=False)
    check_vocabulary(model, tokens)
    check_lengths(model, tokens, max_new_tokens)
    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "label": label}
    said, from_cache = answered(model, tokenizer, tokens, cache=cache, **sizes)
    ends = end_tokens(model, text_part(tokenizer))
    answers = [answer_of(one.text) for one in responses_of(model, text_part(tokenizer), tokens, said)]
    verdicts = [
        _verdict(_answer(row), answer, check, ended=bool(ids) and (len(ids) < max_new_tokens or ids[-1] in ends))
        for row, answer, ids in zip(rows, answers, said, strict=True)
    ]
    new = [
        _with_answer(row, answer) if verdict == "kept" else row
        for row, answer, verdict in zip(rows, answers, verdicts, strict=True)
    ]
    counts = {name: verdicts.count(name) for name in ("kept", "same", "wrong", "giveaways", "unended")}
    return Rewriting(new, **counts, from_cache=from_cache)


def _verdict(answer: str, rewriting: str, check: Check, *, ended: bool) -> str:
    if not ended:
        return "unended"
    if same_text(answer, rewriting):
        return "same"
    if not check(answer, rewriting):
        return "wrong"
    return "giveaways" if any(words in rewriting.casefold() for words in GIVE_AWAYS) else "kept"


def _question(row: dict[str, Any]) -> str:
    question: str = row["prompt"][-1]["content"]
    return question


def _answer(row: dict[str, Any]) -> str:
    answer: str = row["completion"][0]["content"]
    return answer


def _with_answer(row: dict[str, Any], answer: str) -> dict[str, Any]:
    return {**row, "completion": [{**row["completion"][0], "content": answer}, *row["completion"][1:]]}
