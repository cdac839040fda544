"""The aligned model's own answers, taken as safety rows: refusals of harmful prompts, answers to harmless ones.

A model is held best by what it says itself: foreign refusals can even hurt (arXiv:2603.10243), and a row in the model's
own words costs nothing where it has not drifted. So its greedy answers are harvested, and a judge says which to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ..errors import ConfigError
from ..live.forward import answered_by_ranks
from ..live.ranks import from_first, rank
from ..signals.chat import template_settings, text_part
from ..signals.model_state import preserve_state
from ..signals.responses import check_vocabulary, continuations, end_tokens, responses_of
from ..signals.rows import PLAIN, Kind, RowFormat, RowTokens, SafetyRow, prompt_tokens
from ..signals.thoughts import ADVICE, counts_of
from .harvest_cache import cached, harvest_folder, harvest_key
from .judges import Judge, KeywordJudge, decides, load_judge
from .prompts import PromptSet
from .verdicts import Verdict, judged

JudgeLike = str | Mapping[str, Any] | Judge | Callable[[str, str], bool]
# Of the harmful prompts an aligned model refuses at least this share, of the harmless ones at most that. SmolLM2-135M
# as it is shipped refuses none, and keywords call 12 of its 128 responses refusals ("I'm sorry for the confusion").
LEAST_REFUSED, MOST_REFUSED = 0.2, 0.5
_WORDS: dict[Kind, str] = {"harm": "harmful", "benign": "harmless"}
# The verdict that a row of a kind is kept for.
_KEPT: dict[Kind, Verdict] = {"harm": "refused", "benign": "complied"}


class KindCounts(NamedTuple):
    """Of the prompts of a kind: how many there were, and how their responses were judged."""

    prompts: int
    refused: int
    complied: int
    incoherent: int
    unjudged: int


@dataclass(frozen=True)
class Harvest:
    """Safety rows in a model's own words: `rows` as text, `tokens` the same as token ids, in the prompts' order.

    `counts` says by kind how many prompts there were and how they were judged; `unended`, how many responses are left
    out since they had not ended; `from_cache`, that the model was not asked again; `failures`, in words, where the
    judge failed.
    """

    rows: tuple[SafetyRow, ...]
    tokens: tuple[RowTokens, ...]
    counts: Mapping[Kind, KindCounts]
    unended: int = 0
    from_cache: bool = False
    failures: tuple[str, ...] = ()

    def kept(self, kind: Kind) -> int:
        """How many rows of a kind there are."""
        return sum(row.kind == kind for row in self.rows)

    def __str__(self) -> str:
        """Such as `kept 121 of 128 harmful, 126 of 128 harmless`."""
        parts = [f"{self.kept(kind)} of {count.prompts} {_WORDS[kind]}" for kind, count in self.counts.items()]
        unended = f"; {self.unended} more had not ended" if self.unended else ""
        return f"kept {', '.join(parts)}{unended}"


def harvest(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[PromptSet],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 32,
    judge: JudgeLike = "keywords",
    row_format: RowFormat = PLAIN,
    chat_template_kwargs: Mapping[str, Any] | str | None = None,
    least_refused: float = LEAST_REFUSED,
    most_refused: float = MOST_REFUSED,
    whole: bool = False,
    cache: bool | str | Path = True,
    label: str | None = "harvest",
) -> Harvest:
    """Return the model's greedy answers to `prompts` that are as an aligned model's: a forward pass a token of a batch.

    Of a harmful set what the judge calls refused is kept, of a harmless one what it calls answered; each row is the
    first `max_new_tokens` tokens as they were generated, with the token that ends the turn where it came; `whole`
    leaves out those in which it did not. The model is asked as it is, so whoever wants the aligned one puts the adapter
    off, and is left as it was found.

    Answers are kept under a fingerprint of the model's weights, the prompts as the template writes them and
    `max_new_tokens`, in `cache` (a folder; True: as `harvest_folder`; False: nowhere), and judged anew each time. A
    judge of harm judges the harmful ones alone, keywords then the others. `label` names the progress bar, which the
    first rank alone has; None for no bar. With many processes every rank must call it; each answers a share, all return
    the same.

    ConfigError where a set of either kind is missing, as `tokenized`, for a prompt that is longer than the model takes,
    and, with the figure, where fewer than `least_refused` of the harmful prompts are refused, more than `most_refused`
    of the harmless ones, or nothing of a kind is left.
    """
    kinds = check_prompt_sets(prompts)
    texts = [prompt for one in prompts for prompt in one.prompts]
    judges = _judges(judge)
    tokens = prompt_tokens(tokenizer, texts, row_format, template_settings(chat_template_kwargs))
    check_vocabulary(model, tokens)
    check_lengths(model, tokens, max_new_tokens)
    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "label": label}
    said, from_cache = answered(model, tokenizer, tokens, cache=cache, **sizes)
    ends = end_tokens(model, text_part(tokenizer))
    responses = [one.text for one in responses_of(model, text_part(tokenizer), tokens, said)]
    verdicts, failures = _verdicts(judges, kinds, texts, responses)
    fitting = [i for i, kind in enumerate(kinds) if verdicts[i] == _KEPT[kind] and said[i]]
    keep = [i for i in fitting if not whole or len(said[i]) < max_new_tokens or said[i][-1] in ends]
    rows = Harvest(
        tuple(SafetyRow(texts[i], responses[i], kinds[i], row_format.system) for i in keep),
        tuple(RowTokens(tuple(tokens[i]), tuple(said[i]), kinds[i]) for i in keep),
        {kind: _counts(kind, kinds, verdicts) for kind in _WORDS},
        len(fitting) - len(keep),
        from_cache,
        failures,
    )
    _check_counts(rows, responses, least_refused, most_refused)
    return rows


def check_prompt_sets(prompts: Sequence[PromptSet]) -> list[Kind]:
    """Return the kind of each prompt of all sets; ConfigError where a set is empty, or there is none of a kind."""
    if not prompts:
        raise ConfigError("harvest: there are no prompts: give a harmful and a harmless set")
    for one in prompts:
        if not one.prompts:
            raise ConfigError(f"harvest: prompt set {one.name!r} is empty: give at least one prompt, or leave it out")
    for kind, word in _WORDS.items():
        if not any(one.kind == kind for one in prompts):
            names = ", ".join(repr(one.name) for one in prompts)
            raise ConfigError(
                f"harvest: there is no {word} set among {names}: give harmful and harmless prompts, so that neither "
                "harm nor over-refusal can hide"
            )
    return [one.kind for one in prompts for _ in one.prompts]


def check_lengths(model: Any, tokens: Sequence[Sequence[int]], new: int) -> None:
    """Raise ConfigError for a prompt that, with `new` tokens after it, is longer than the model has positions for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(tokens)), key=lambda i: len(tokens[i]))
    if limit is not None and len(tokens[longest]) + new > limit:
        raise ConfigError(
            f"prompt {longest + 1} of {len(tokens)} has {len(tokens[longest])} tokens, and with {new} more it is "
            f"longer than the {limit} that the model takes (max_position_embeddings): shorten it, or leave it out"
        )


def _judges(judge: JudgeLike) -> dict[Kind, Judge]:
    """Who judges each kind: a judge of harm cannot see over-refusal, so keywords then judge the harmless."""
    judge = load_judge(judge)
    return {"harm": judge, "benign": judge if decides(judge) == "refusal" else KeywordJudge()}


def answered(
    model: Any,
    tokenizer: Any,
    tokens: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    label: str | None = None,
    cache: bool | str | Path = True,
) -> tuple[list[list[int]], bool]:
    """Return what the model as it is now says after each sequence, greedily, as token ids; and whether it was kept.

    `cache` and `label` as `harvest`; the model is left as it was. Collective; each rank answers a share.
    """
    sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "label": label if rank() == 0 else None}
    key = harvest_key(model, tokenizer, tokens, max_new_tokens)
    return cached(harvest_folder(cache), key, tokens, lambda: _continued(model, tokenizer, tokens, sizes))


def _continued(
    model: Any, tokenizer: Any, tokens: Sequence[Sequence[int]], sizes: Mapping[str, Any]
) -> list[list[int]]:
    def answers_to(share: Sequence[Any], synced: bool) -> list[list[int]]:
        return continuations(model, text_part(tokenizer), share, **sizes, synced=synced)

    with preserve_state(model, tokenizer):
        return answered_by_ranks(model, tokens, answers_to)


def _verdicts(
    judges: Mapping[Kind, Judge], kinds: Sequence[Kind], prompts: Sequence[str], responses: Sequence[str]
) -> tuple[list[Verdict], tuple[str, ...]]:
    """The first rank's verdicts, in the prompts' order, and what failed, in words."""
    verdicts: list[Verdict] = ["unjudged"] * len(kinds)
    failures: list[str] = []
    for kind, judge in judges.items() if rank() == 0 else ():
        places = [i for i, one in enumerate(kinds) if one == kind]
        verdicts_of_kind = judged(
            judge, [prompts[i] for i in places], [responses[i] for i in places], failures=failures
        )
        for i, verdict in zip(places, verdicts_of_kind, strict=True):
            verdicts[i] = verdict
    verdicts, failures = from_first((verdicts, failures))
    return verdicts, tuple(dict.fromkeys(failures))


def _counts(kind: Kind, kinds: Sequence[Kind], verdicts: Sequence[Verdict]) -> KindCounts:
    verdicts_of_kind = [verdict for one, verdict in zip(kinds, verdicts, strict=True) if one == kind]
    return KindCounts(len(verdicts_of_kind), *(verdicts_of_kind.count(verdict) for verdict in get_args(Verdict)))


def _check_counts(harvest: Harvest, responses: Sequence[str], least: float, most: float) -> None:
    """Refuse what no aligned model answers: ConfigError with the figure."""
    for kind, counts in harvest.counts.items():
        if counts.unjudged == counts.prompts:
            unfinished = counts_of(responses).unfinished
            why = (
                f"{unfinished} responses end within a thought: {ADVICE}" if unfinished else "; ".join(harvest.failures)
            )
            raise ConfigError(f"harvest: no response to a {_WORDS[kind]} prompt could be judged. {why}")
    harm, benign = harvest.counts["harm"], harvest.counts["benign"]
    if not harm.refused or harm.refused < least * harm.prompts:
        raise ConfigError(
            f"the base is not aligned: it refuses {_of(harm)} harmful prompts, so it has no refusals to hold on to. "
            "Start from an aligned (chat or instruct) model. If it refuses in words that this judge does not know, "
            "write its rows by another: `safemerge harvest MODEL --judge JUDGE -o rows.jsonl`. Such rows, or some of "
            "your own (columns prompt and response), are given as corrections=[{'replay': {'rows': 'rows.jsonl'}}]"
        )
    if benign.refused > most * benign.prompts:
        raise ConfigError(
            f"the base refuses {_of(benign)} harmless prompts: held to its own answers it would learn to refuse "
            "everything. Give harmless prompts that it answers, or rows of your own"
        )
    for kind, counts in harvest.counts.items():
        if not harvest.kept(kind):
            raise ConfigError(
                f"harvest: nothing is left of {counts.prompts} {_WORDS[kind]} prompts ({counts.refused} refused, "
                f"{counts.complied} answered, {counts.incoherent} incoherent, {counts.unjudged} not judged, "
                f"{harvest.unended} of both kinds not ended): rows of one kind "
                "alone teach a model to refuse all or nothing. Give other prompts, or rows of your own"
            )


def _of(counts: KindCounts) -> str:
    return f"{counts.refused} of {counts.prompts} ({counts.refused / counts.prompts:.0%})"
