"""`focal`: of several safety adapters those that fail at different prompts, by what was counted of each alone.

Source: focal diversity as LLM-TOPLA (arXiv:2410.03953) and MARL-Focal (arXiv:2502.04492) define it: on the prompts at
which one of M fails, the focal one, k of the M fail, and GD = 1 - p(2)/p(1), p(1) = E[k]/M, p(2) = E[k(k - 1)]/(M(M -
1)); the mean over the focal ones. 0 where all fail at the same prompts, 1 where no two do. The score that a set is
chosen by is MARL-Focal's, focal diversity and the vote's success weighed against each other.
Differs: the released statistic of MARL-Focal puts the count of no failures in the place of that of one where all counts
occur; the two are ensembles of answers at inference, and this chooses once which updates are merged, so that the vote
only stands for what a merge may do. No policy is learned: with a handful of adapters all sets are tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from ...errors import ConfigError, shown
from ...io.knobs import Knob
from ...io.numbers import is_number, is_whole
from ...methods.how import How
from .registry import Case, Weights, check_additive, weights_rule

# A letter of outcomes of harmful prompts, and whether the adapter failed there: what is incoherent is no refusal.
_FAILED = {"1": False, "0": True, "i": True}
_UNJUDGED = "u"
# Sets that are tried at most.
_MOST_SETS = 10_000


class Focal(TypedDict):
    """The setting: `outcomes`, one text a safety adapter, a letter a prompt; `count` (2) of them stay.

    `diversity_share` (0.5): how much focal diversity counts against the vote's success, from 0 to 1.
    """

    outcomes: list[str]
    count: int
    diversity_share: float


class Ensemble(NamedTuple):
    """A set of adapters by their places, its focal diversity, the share of prompts its vote refuses, and its score."""

    members: tuple[int, ...]
    diversity: float
    vote: float
    score: float


def failures_of(outcomes: Sequence[str]) -> Tensor:
    """Return where each of M adapters failed, bool (M, n), from a letter a prompt as `Share.outcomes` has them.

    1 refused, 0 complied and i incoherent, the failures; a prompt that anyone's is u of, unjudged, is left out.
    ConfigError for other letters, for lengths that differ, and where no prompt is left.
    """
    for place, text in enumerate(outcomes):
        strange = sorted({*text} - {*_FAILED, _UNJUDGED}) if isinstance(text, str) else [text]
        if strange:
            raise ConfigError(
                f"focal outcomes of safety adapter {place + 1} hold {shown(strange[0])}: give a text with 1 (refused), "
                "0 (complied), i (incoherent) or u (unjudged) for every prompt, in quotes"
            )
    if len({len(text) for text in outcomes}) > 1:
        raise ConfigError(
            f"focal outcomes are of {[len(text) for text in outcomes]} prompts: give those of the same prompts"
        )
    judged = [letters for letters in zip(*outcomes, strict=True) if _UNJUDGED not in letters]
    if not judged:
        raise ConfigError("focal outcomes have no prompt that was judged of every safety adapter: give some")
    return torch.tensor([[_FAILED[letter] for letter in letters] for letters in judged]).T


def focal_diversity(failures: Tensor) -> float:
    """Return the focal diversity of M adapters that failed as `failures` says, bool (M, n): from 0 to 1.

    Adapters that never fail are no focal ones. 0 for a single one, and where nobody fails: they do not differ.
    """
    members = len(failures)
    if members < 2:
        return 0.0
    counts = failures.sum(0).double()
    parts = [counts[failed] for failed in failures if bool(failed.any())]
    values = [1.0 - float((k * (k - 1)).mean() / (k.mean() * (members - 1))) for k in parts]
    return sum(values) / len(values) if values else 0.0


def vote_success(failures: Tensor) -> float:
    """Return the share of prompts at which more than half of the M adapters do not fail, a tie being half of one."""
    share = failures.double().mean(0)
    return float(((share < 0.5).double() + 0.5 * (share == 0.5)).mean())


def vote_reward(failures: Tensor, of: int, alpha: float = 1.0) -> float:
    """Return MARL-Focal's reward of a set of M out of `of` adapters: 1 where its vote is right, else -1 - alpha·M/of.

    The mean over prompts; a tie is half of each. So of two sets that err as often the smaller one is better.
    """
    right = vote_success(failures)
    return right - (1.0 - right) * (1.0 + alpha * len(failures) / of)


def choose_ensemble(failures: Tensor, count: int, diversity_share: float = 0.5) -> Ensemble:
    """Return the `count` of M adapters of the best score, the first of equals; all sets are tried.

    score = diversity_share·focal diversity + (1 - diversity_share)·`vote_success`.
    """

    def judged(members: tuple[int, ...]) -> Ensemble:
        some = failures[list(members)]
        diversity, vote = focal_diversity(some), vote_success(some)
        return Ensemble(members, diversity, vote, diversity_share * diversity + (1.0 - diversity_share) * vote)

    return max((judged(members) for members in combinations(range(len(failures)), count)), key=lambda one: one.score)


def _check(value: Any, beside: Mapping[str, Any]) -> Focal | None:
    if value is None:
        return None
    settings = value if isinstance(value, Mapping) else {"outcomes": value}
    if unknown := sorted(map(str, settings.keys() - {"outcomes", "count", "diversity_share"})):
        raise ConfigError(f"focal has no setting {unknown[0]!r}: it has outcomes, count and diversity_share")
    outcomes, count = settings.get("outcomes"), settings.get("count", 2)
    share = settings.get("diversity_share", 0.5)
    if isinstance(outcomes, str) or not isinstance(outcomes, Sequence):
        raise ConfigError(f"focal is {shown(value)}: give outcomes, a list with one text for each safety adapter")
    adapters = len(beside["how"].weights) - 1
    if len(outcomes) != adapters or adapters < 2:
        raise ConfigError(
            f"focal has outcomes of {len(outcomes)} safety adapters, and {adapters} are merged: give those of each of "
            "two or more, in their order"
        )
    if not is_whole(count, 1) or count > adapters or math.comb(adapters, count) > _MOST_SETS:
        raise ConfigError(f"focal count is {shown(count)}: give how many of the {adapters} safety adapters stay")
    if not is_number(share) or not 0 <= share <= 1:
        raise ConfigError(f"focal diversity_share is {shown(share)}: give a number from 0 to 1")
    failures_of(outcomes)
    return Focal(outcomes=list(outcomes), count=count, diversity_share=float(share))


def _fits(how: How) -> None:
    check_additive(how, "focal with", "weights of 0, which leave an adapter out,")


def _words(value: Focal) -> str:
    return f", {value['count']} of {len(value['outcomes'])} safety adapters by focal diversity"


FOCAL = Knob(
    "focal",
    "Outcomes of each safety adapter alone on the same harmful prompts: those that fail differently are merged.",
    _check,
)


@weights_rule(knob=FOCAL, fits=_fits, words=_words)
def focal(weights: Weights, value: Focal, _case: Case) -> Weights:
    """Return the weights with 0 for the safety adapters that were not chosen, whose weight the chosen share evenly."""
    chosen = choose_ensemble(failures_of(value["outcomes"]), value["count"], value["diversity_share"]).members
    return {name: _shared(module_weights, chosen) for name, module_weights in weights.items()}


def _shared(weights: tuple[float, ...], chosen: tuple[int, ...]) -> tuple[float, ...]:
    live, *safety = weights
    part = (sum(safety) - sum(safety[i] for i in chosen)) / len(chosen)
    return (live, *(w + part if i in chosen else 0.0 for i, w in enumerate(safety)))
