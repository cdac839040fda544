"""Judges whose verdicts are known before they are asked."""

from __future__ import annotations

from collections.abc import Sequence


class Says:
    """A judge that refuses the first `counts[i]` harmful prompts at its i-th probe, and no benign ones."""

    def __init__(self, *counts: int) -> None:
        self.counts, self.asked = list(counts), 0

    def refuse_all(self, prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
        """Judge a batch; benign prompts are known by `x y` among them."""
        if "x y" in prompts:
            return [False] * len(prompts)
        count = self.counts[min(self.asked, len(self.counts) - 1)]
        self.asked += 1
        return [i < count for i in range(len(prompts))]

    def refuses(self, prompt: str, response: str) -> bool:
        """Fail: whoever has the batched verdicts asks for them."""
        raise AssertionError("the batched verdicts are used")
