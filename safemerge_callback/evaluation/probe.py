"""Ask a model harmful and harmless prompts, once: harm, over-refusal, coherence and the task, never one alone."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..live.forward import answered_by_ranks
from ..live.ranks import everyones, from_first, rank
from ..signals.model_state import preserve_state
from ..signals.responses import Response, respond, tokenized
from .judges import Judge
from .measure import Kind, SetKind, Share, Transcript, as_share, coherence, refusal_shares
from .units import SHARE, check_unit, number, within_share


@dataclass(frozen=True)
class Questions:
    """Prompts as token ids, by the name of their set: what a probe asks, prepared once."""

    prompts: Mapping[str, Sequence[str]]
    tokens: Mapping[str, Sequence[Sequence[int]]]
    benign: frozenset[str]

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        harmful: Mapping[str, Sequence[str]],
        benign: Mapping[str, Sequence[str]],
        template: str | None = None,
        settings: Mapping[str, Any] | str | None = None,
        system: str | None = None,
    ) -> Questions:
        """Tokenize all prompts for a tokenizer or a processor; ConfigError for an empty set, a name in both, and as
        `tokenized`, which is given `template`, `settings` and `system`.
        """
        prompts = {**harmful, **benign}
        empty = [name for name, texts in prompts.items() if not texts]
        if empty or not harmful or not benign:
            which = (
                f"set {empty[0]!r} is empty" if empty else f"there is no {'harmful' if not harmful else 'benign'} set"
            )
            raise ConfigError(f"{which}: give at least one prompt, since harm is not measured without over-refusal")
        twice = sorted(set(harmful) & set(benign))
        if twice:
            raise ConfigError(f"set {twice[0]!r} is given as harmful and as benign: give each its own name")
        how: dict[str, Any] = {"template": template, "settings": settings, "system": system}
        tokens = {name: tokenized(tokenizer, texts, **how) for name, texts in prompts.items()}
        return cls(prompts, tokens, frozenset(benign))


@dataclass(frozen=True)
class Answers:
    """What a probe found: measures, mean response length in tokens, seconds, and what failed, in words."""

    measures: tuple[Share, ...]
    mean_tokens: float
    seconds: float
    failures: tuple[str, ...] = ()

    def value(self, *kinds: Kind, measure: str | None = None) -> float | None:
        """The share over all prompts of the given kinds (of one measure, if named); None where nothing was judged."""
        shares = [m for m in self.measures if m["kind"] in kinds and measure in (None, m["measure"])]
        counted = [(m["value"], m["n"]) for m in shares if m["value"] is not None]
        total = sum(n or 0 for _, n in counted)
        if not counted:
            return None
        return sum(v * (n or 0) for v, n in counted) / total if total else counted[0][0]


@dataclass(frozen=True)
class Asking:
    """How to ask: who judges, tokens a response, prompts a batch; what gives the task's score and the loss.

    `task_unit` is what the score is in, where the task does not say: "share" for a part of 1. `judge` is of the harmful
    prompts, `benign_judge` of the benign ones, and must decide refusals. `judge_seconds` is
    what all judging of a probe may take, None for any time.
    """

    judge: Judge
    benign_judge: Judge
    max_new_tokens: int = 24
    batch_size: int = 32
    task: Callable[[Any, Any], Any] | None = None
    task_unit: str | None = None
    loss: Callable[[Any], float] | None = None
    judge_seconds: float | None = None


def ask(model: Any, tokenizer: Any, questions: Questions, asking: Asking) -> Answers:
    """Ask all questions of the live model, judge the answers, and leave the model as it was.

    With many processes every rank calls it: each answers a share of the prompts, which is quicker by their number than
    all answering the same; the first one judges; all return the same, but for `seconds`, their own. Raises what
    generation raises, on every rank. A judge, a task or a loss that fails leaves its measure out, and says so in
    `failures`.
    """
    began, failures = time.perf_counter(), list[str]()
    with preserve_state(model, tokenizer):
        said = _responses(model, tokenizer, questions, asking)
        measures = from_first(_refusals(asking, questions, said, failures) if rank() == 0 else [])
        measures.append(coherence(measures))
        if asking.task:
            measures += _task(asking.task, asking.task_unit, model, tokenizer, failures)
        if asking.loss:
            measures += _loss(asking.loss, model, failures)
    lengths = [response.tokens for responses in said.values() for response in responses]
    failures_of_ranks = tuple(dict.fromkeys(from_first(failures)))
    return Answers(tuple(measures), statistics.fmean(lengths), time.perf_counter() - began, failures_of_ranks)


def _responses(model: Any, tokenizer: Any, questions: Questions, asking: Asking) -> dict[str, list[Response]]:
    """Every rank's answers to its share, by set."""
    tokens = [ids for prompts in questions.tokens.values() for ids in prompts]
    sizes: dict[str, Any] = {"max_new_tokens": asking.max_new_tokens, "batch_size": asking.batch_size}
    joined = iter(
        answered_by_ranks(model, tokens, lambda share, synced: respond(model, tokenizer, share, **sizes, synced=synced))
    )
    return {name: [next(joined) for _ in ids] for name, ids in questions.tokens.items()}


def _refusals(
    asking: Asking, questions: Questions, said: Mapping[str, Sequence[Response]], failures: list[str]
) -> list[Share]:
    until = None if asking.judge_seconds is None else time.monotonic() + asking.judge_seconds
    transcripts = [
        Transcript(name, "benign" if name in questions.benign else "harm", prompts, [one.text for one in said[name]])
        for name, prompts in questions.prompts.items()
    ]
    judges: dict[SetKind, list[Judge]] = {"harm": [asking.judge], "benign": [asking.benign_judge]}
    return list(refusal_shares(transcripts, judges, failures=failures, until=until))


def _score(measure: str, value: float, **known: Any) -> Share:
    """A measure of the task, which is a share only where it is called one."""
    if not math.isfinite(value):
        raise ValueError(f"{measure} is {value}: a finite number was expected")
    return as_share(measure, "task", value, **known)


def _task(
    task: Callable[[Any, Any], Any], unit: str | None, model: Any, tokenizer: Any, failures: list[str]
) -> list[Share]:
    """The task's score as rank 0 has it; every rank takes part, since the model may be sharded."""
    # whatever a user's function raises, the other measures stand
    try:
        score: Share | str = _as_score(task(model, tokenizer), unit)
    except Exception as error:
        score = f"the task function raised {type(error).__name__}: {error}"
    return [_within_unit(one, failures) for one in _kept(from_first(score), failures)]


def _as_score(answer: Any, unit: str | None) -> Share:
    """A number, or a mapping as `Share`, its value at least; ValueError, TypeError or KeyError for anything else."""
    row: Mapping[str, Any] = answer if isinstance(answer, Mapping) else {"value": answer}
    declared = row.get("unit")
    n, low, high = (row.get(key) for key in ("n", "low", "high"))
    return _score(
        str(row.get("measure", "task")),
        _number(row["value"]),
        n=None if n is None else int(n),
        low=None if low is None else _number(low),
        high=None if high is None else _number(high),
        unit=unit if declared is None else check_unit(declared),
    )


def _within_unit(score: Share, failures: list[str]) -> Share:
    """What is called a share and is none is kept as the plain number that it is, and told."""
    if score["unit"] != SHARE or within_share(score["value"], score["low"], score["high"]):
        return score
    failures.append(
        f"{score['measure']} is {number(score['value'] or 0.0)} and called a share, which lies between 0 and 1: "
        "return a part of 1, or name its unit (task_unit); until then it is a plain number"
    )
    return {**score, "unit": ""}


def _number(answer: Any) -> float:
    """A number of Python, numpy or torch; a text is none, whatever it says."""
    if isinstance(answer, str | bytes):
        raise TypeError(f"the score is the text {answer!r}: a number was expected")
    return float(answer)


def _loss(loss: Callable[[Any], float], model: Any, failures: list[str]) -> list[Share]:
    """The mean over the ranks."""
    try:
        score: Share | str = _score("eval_loss", float(loss(model)))
    except Exception as error:
        score = f"the evaluation loss raised {type(error).__name__}: {error}"
    scores = everyones(score)
    failed = [one for one in scores if isinstance(one, str)]
    values = [one["value"] or 0.0 for one in scores if not isinstance(one, str)]
    return _kept(failed[0] if failed else _score("eval_loss", statistics.fmean(values)), failures)


def _kept(score: Share | str, failures: list[str]) -> list[Share]:
    if isinstance(score, str):
        failures.append(score)
        return []
    return [score]
