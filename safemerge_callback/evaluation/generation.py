"""Greedy responses of a live model to prompts, in batches, and nothing else about the model changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..errors import ConfigError

# Sampling settings that a checkpoint brings along are put back to neutral, or transformers warns of each.
GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "pad_token_id": 0, "use_cache": True}
PLACE = "{prompt}"


class Response(NamedTuple):
    """What the model said to one prompt, and how many tokens that took, its end-of-turn token not counted."""

    text: str
    tokens: int


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    batch_size: int = 32,
    label: str | None = "generate",
) -> list[str]:
    """Return the model's greedy response to each prompt as a user's turn, in the order of `prompts`.

    Padding is masked, and a response ends at its first end-of-turn token, so neither the batch nor the padding token
    changes a response (up to the rounding of batched arithmetic). Training mode is as before afterwards. `label` names
    the progress bar; None for no bar. ConfigError for a tokenizer without a chat template.
    """
    tokens = tokenized(tokenizer, prompts)
    found = respond(model, tokenizer, tokens, max_new_tokens=max_new_tokens, batch_size=batch_size, label=label)
    return [response.text for response in found]


def tokenized(tokenizer: Any, prompts: Sequence[str], template: str | None = None) -> list[list[int]]:
    """Return the token ids of each prompt as a user's turn, up to where the model's own turn begins.

    In the tokenizer's chat template, which writes the special tokens itself; or in `template`, a text that holds
    `{prompt}`, between the tokenizer's own special tokens. ConfigError where there is neither.
    """
    if template is not None:
        if PLACE not in template:
            raise ConfigError(f"template {template!r} has no place for the prompt: put {PLACE} where it goes")
        return tokenizer([template.replace(PLACE, prompt) for prompt in prompts])["input_ids"] if prompts else []
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the tokenizer has no chat template: take a chat or instruct model, set tokenizer.chat_template, or give "
            f"`template`, the words around a prompt, such as 'Question: {PLACE}\\nAnswer:'"
        )
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) if turns else []
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def respond(
    model: Any,
    tokenizer: Any,
    tokens: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 40,
    batch_size: int = 32,
    label: str | None = None,
    synced: bool | None = None,
) -> list[Response]:
    """Return the greedy response to each sequence of token ids, in their order; as `generate`.

    `synced` goes on until every rank has finished, which a model needs whose forward pass takes all ranks; None lets
    transformers find out.
    """
    from tqdm import tqdm

    # Alike lengths together: little padding. The longest first, so that memory fails at once or not at all.
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    responses = [Response("", 0)] * len(tokens)
    ends = _end_tokens(model, tokenizer)
    with evaluating(model):
        starts = range(0, len(order), batch_size)
        for start in tqdm(starts, desc=label, disable=True if label is None else None):
            batch = order[start : start + batch_size]
            new = _continue(model, [tokens[i] for i in batch], ends, max_new_tokens, synced)
            for i, answer in zip(batch, new.tolist(), strict=True):
                stop = next((at for at, token in enumerate(answer) if token in ends), len(answer))
                text = tokenizer.decode(answer[:stop], skip_special_tokens=True).strip()
                responses[i] = Response(text, stop)
    return responses


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put the model in evaluation mode, and afterwards each module back in the mode it was in.

    That also sets gradient checkpointing aside, which transformers does in training mode alone.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    ends: int | Iterable[int] | None = model.generation_config.eos_token_id or tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def _continue(
    model: Any, tokens: Sequence[Sequence[int]], ends: list[int], max_new_tokens: int, synced: bool | None
) -> Any:
    """Return the new token ids (batch, at most max_new_tokens) after `tokens`, padded on the left with id 0."""
    import torch

    longest = max(map(len, tokens))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in tokens], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in tokens], device=model.device)
    # The model's own class of settings: this floor does not import transformers.
    greedy = type(model.generation_config)(**GREEDY, max_new_tokens=max_new_tokens, eos_token_id=ends or None)
    with torch.no_grad():
        said = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, synced_gpus=synced)
    return said[:, longest:]
