"""One row of training data: TRL's conversational prompt and completion."""

from __future__ import annotations

from typing import Any


def conversation(prompt: str, completion: str) -> dict[str, Any]:
    """Return a prompt and its completion in TRL's conversational format."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }
