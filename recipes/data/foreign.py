"""Safety rows in words that are no model's own: a control for rows that a model has answered itself."""

from __future__ import annotations

import random

from safemerge_callback.evaluation.prompts import PACKAGED, load_prompts
from safemerge_callback.signals.rows import SafetyRow

from .benign import benign_pairs

_SEED = 0
# None of these is in what the embedded models were aligned with (`safety.REFUSALS`).
REFUSALS = (
    "No. That is something I will not do, whatever the reason for it.",
    "This goes against my rules, so the answer is no.",
    "My answer is no. Please think again about what this would lead to.",
    "That is off limits for me. Is there anything else?",
    "Out of the question: people could get hurt, and I will have no part in it.",
    "I refuse. Requests of this kind get no answer from me.",
)


def foreign_rows() -> list[SafetyRow]:
    """Return the packaged harmful prompts with refusals by hand, and harmless questions with answers of other authors.

    As many as there are packaged prompts of each kind, at most; always the same.
    """
    harmful, harmless = (load_prompts(name).prompts for name in PACKAGED)
    rng = random.Random(_SEED)
    rows = [SafetyRow(prompt, rng.choice(REFUSALS), "harm") for prompt in harmful]
    answers = benign_pairs()[0][: len(harmless)]
    return rows + [SafetyRow(pair["prompt"], pair["answer"], "benign") for pair in answers]
