"""Rows as tokens, with responses that the model writes itself where a row has none; a forward pass a token of those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .chat import text_part
from .model_state import preserve_state
from .responses import continuations
from .rows import PLAIN, RowTokens, SafetyRow, prompt_tokens, row_tokens

# Tokens of a response that are read or written: by then a refusal is one.
FIRST_TOKENS = 16


def answered_tokens(
    model: Any,
    tokenizer: Any,
    rows: Sequence[SafetyRow],
    *,
    settings: Mapping[str, Any] | str | None = None,
    first_tokens: int = FIRST_TOKENS,
    batch_size: int = 16,
    label: str | None = None,
) -> tuple[RowTokens, ...]:
    """Return rows as token ids, the first of each response; greedy ones of `model` where a response is empty.

    `settings` go to the chat template; a row has its own system prompt. `label` names the progress bar; None for no
    bar. ConfigError as `row_tokens`. The model is left as it was.
    """
    tokens: dict[int, RowTokens] = {}
    full = [place for place, row in enumerate(rows) if row.response]
    written = row_tokens(tokenizer, [rows[i] for i in full], settings=settings, first_tokens=first_tokens)
    tokens.update(zip(full, written, strict=True))
    bare = [place for place, row in enumerate(rows) if not row.response]
    if bare:
        prompts = [_prompt(tokenizer, rows[i], settings) for i in bare]
        with preserve_state(model, tokenizer):
            said = continuations(
                model, text_part(tokenizer), prompts, max_new_tokens=first_tokens, batch_size=batch_size, label=label
            )
        for i, prompt, response in zip(bare, prompts, said, strict=True):
            tokens[i] = RowTokens(tuple(prompt), tuple(response), rows[i].kind)
    return tuple(tokens[i] for i in range(len(rows)))


def _prompt(tokenizer: Any, row: SafetyRow, settings: Mapping[str, Any] | str | None) -> list[int]:
    row_format = PLAIN if row.system is None else type(PLAIN)(row.system)
    return prompt_tokens(tokenizer, [row.prompt], row_format, settings)[0]
