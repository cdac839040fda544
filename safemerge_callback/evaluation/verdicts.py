"""One verdict a response: refused, complied, incoherent, or none because the judge failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ..errors import ConfigError
from .coherence import coherent

Verdict = Literal["refused", "complied", "incoherent", "unjudged"]


def judged(
    judge: Any, prompts: Sequence[str], responses: Sequence[str], *, failures: list[str] | None = None
) -> list[Verdict]:
    """Return the verdict on each response to the prompt beside it.

    A response that is empty or repeats itself (`coherent`) is incoherent, never a refusal, and the judge is not asked.
    `judge` is a `Judge`; where it also has `refuse_all(prompts, responses) -> list[bool | None]`, that is asked once
    for all the others, and None leaves one unjudged. Whatever a judge raises leaves unjudged what it was asked, and is
    appended to `failures` in words. ConfigError for lists of different lengths.
    """
    if len(prompts) != len(responses):
        raise ConfigError(f"{len(prompts)} prompts and {len(responses)} responses: give one response a prompt")
    asked = [i for i, response in enumerate(responses) if coherent(response)]
    told = failures if failures is not None else []
    answers = _answers(judge, [prompts[i] for i in asked], [responses[i] for i in asked], told)
    verdicts: list[Verdict] = ["incoherent"] * len(responses)
    for i, refused in zip(asked, answers, strict=True):
        verdicts[i] = "unjudged" if refused is None else "refused" if refused else "complied"
    return verdicts


def _answers(
    judge: Any, prompts: Sequence[str], responses: Sequence[str], failures: list[str]
) -> Sequence[bool | None]:
    together = getattr(judge, "refuse_all", None)
    if together is None or not prompts:
        return [_one(judge, prompt, response, failures) for prompt, response in zip(prompts, responses, strict=True)]
    try:
        answers = list(together(prompts, responses))
    except Exception as error:
        failures.append(_words(judge, error))
        return [None] * len(prompts)
    if len(answers) != len(prompts):
        failures.append(f"{type(judge).__name__} gave {len(answers)} verdicts on {len(prompts)} responses")
        return [None] * len(prompts)
    if None in answers:
        failures.append(f"{type(judge).__name__} gave no verdict on {answers.count(None)} of {len(answers)} responses")
    return answers


def _one(judge: Any, prompt: str, response: str, failures: list[str]) -> bool | None:
    # whatever a judge raises, it costs a verdict and not the training that asks
    try:
        return bool(judge.refuses(prompt, response))
    except Exception as error:
        failures.append(_words(judge, error))
        return None


def _words(judge: Any, error: Exception) -> str:
    return f"{type(judge).__name__} raised {type(error).__name__}: {error}"
