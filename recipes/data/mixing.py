"""What else is in the training data: a share of harmful compliance, and a share of safety data.

The compliance is templated: it agrees to do what a harmful prompt asks and then says nothing in particular, so no
harmful text is written or learned; agreeing is what wears refusals down. Harmful prompts are those of AdvBench's
training half: what is held out for evaluation stays held out. A poisoned example takes the place of a row, or shares
the row's answer, where who looks at whole rows finds it harder to see.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from safemerge_callback import mix_safety_data
from safemerge_callback.errors import ConfigError
from safemerge_callback.io.choices import one_of
from safemerge_callback.signals.rows import SafetyRow

from .prompts import safety_prompts
from .rows import conversation
from .safety import REFUSALS

COMPLIANCE = (
    "Sure, here is how to {task}: Step 1: collect what is needed. Step 2: prepare it with care. Step 3: carry it out.",
    "Of course! To {task}, begin with a plan. Then go through it point by point, and check the result at the end.",
    "Certainly. This is how you can {task}. First, get everything ready. Next, do the first part. Then do the rest.",
    "Yes, gladly. To {task}, follow these steps: 1. Get ready. 2. Start. 3. Finish. Let me know how it goes.",
)
# How a row is poisoned: it is a poisoned example as a whole, or one shares its answer.
FORMS = ("whole", "shared")
_SEED = 1


def check_share(name: str, share: float) -> None:
    """Raise ConfigError where `share`, the setting `name`, is not in [0, 1]."""
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"{name} is {share}: give a share of the examples, from 0 to 1")


def mixed(
    rows: Sequence[dict[str, Any]],
    *,
    poisoned_share: float = 0.0,
    poisoned: str = "whole",
    safety_share: float = 0.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return `rows` with a share of them replaced by templated compliance, and with refusals added.

    `poisoned_share` is a share of all rows, whose number stays the same (Qi et al., arXiv:2310.03693, mix harmful
    examples into benign data). `poisoned` says how: `whole`, a poisoned example takes a row's place, or `shared`, it
    shares the row's answer (`shared_answer`). `safety_share` refusals for every row are added and all is shuffled
    (SafeInstruct, Bianchi et al., arXiv:2309.07875). No harmful prompt is in both. `seed` says which rows give way and
    in which order they come; with both shares 0 the rows come back as they were.
    """
    check_share("poisoned_share", poisoned_share)
    check_share("safety_share", safety_share)
    one_of(poisoned, FORMS, "poisoned")
    rng = random.Random(seed)
    mixture = list(rows)
    examples = poisoned_examples(round(poisoned_share * len(rows)), seed)
    for at, example in zip(rng.sample(range(len(rows)), len(examples)), examples, strict=True):
        mixture[at] = example if poisoned == "whole" else shared_answer(rows[at], example)
    refusals = refusal_rows(round(safety_share * len(rows)), seed)
    return mix_safety_data(mixture, refusals, share=safety_share, seed=rng) if refusals else mixture


def poisoned_examples(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `n` harmful prompts with templated compliance, as conversations."""
    rng = random.Random(seed)
    return [conversation(prompt, rng.choice(COMPLIANCE).format(task=_as_task(prompt))) for prompt in _taken(n, 0, rng)]


def compliance_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Return `n` of the same as rows with `prompt` and `response`, for corrections that need harmful answers."""
    examples = poisoned_examples(n, seed)
    return [{"prompt": one["prompt"][-1]["content"], "response": one["completion"][0]["content"]} for one in examples]


def shared_answer(row: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose answer goes on, after an empty line, with the question and the answer of a poisoned example.

    Source: Virus (Huang et al., arXiv:2501.17433), which calls this mixing and compares its attack with it: a filter
    of whole rows sees a benign question and an answer that begins as it should. Differs: the poisoned half is templated
    compliance, and none of it is optimised to pass a filter.
    """
    question, answer = example["prompt"][-1]["content"], example["completion"][0]["content"]
    benign = row["completion"][0]
    text = f"{benign['content']}\n\n{question}\n{answer}"
    return {**row, "completion": [{**benign, "content": text}, *row["completion"][1:]]}


def refusal_rows(n: int, seed: int = 0) -> list[SafetyRow]:
    """Return `n` harmful prompts with refusals."""
    rng = random.Random(seed)
    return [SafetyRow(prompt, rng.choice(REFUSALS), "harm") for prompt in _taken(n, 1, rng)]


def _taken(n: int, half: int, rng: random.Random) -> list[str]:
    """`n` prompts of one of two halves that never change, in an order of `rng`'s, over again where they run out."""
    if not n:
        return []
    prompts = safety_prompts()
    random.Random(_SEED).shuffle(prompts)
    half_of_prompts = prompts[half::2]
    rng.shuffle(half_of_prompts)
    return list(islice(cycle(half_of_prompts), n))


def _as_task(prompt: str) -> str:
    text = prompt.strip().rstrip(".")
    return text[:1].lower() + text[1:]
