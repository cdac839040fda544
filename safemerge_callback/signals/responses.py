"""Greedy responses of a live model to prompts, in batches, and nothing else about the model changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from ..errors import ConfigError
from ..io.bars import bars_shown
from ..io.texts import check_whole
from .chat import PLACE, check_tokens_differ, inherited, questions, template_settings, text_part
from .thoughts import tell_unfinished, with_marks

# Sampling settings that a checkpoint brings along are put back to neutral, or transformers warns of each.
GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "pad_token_id": 0, "use_cache": True}


Item = TypeVar("Item")


class Response(NamedTuple):
    """What the model said to one prompt, and how many tokens that took, its end-of-turn token not counted.

    A thought stands in the text between `<think>` and `</think>`, also where the prompt itself opened it.
    """

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
    chat_template_kwargs: Mapping[str, Any] | str | None = None,
    system: str | None = None,
) -> list[str]:
    """Return the model's greedy response to each prompt as a user's turn, a forward pass a token of a batch.

    In the order of `prompts`. Padding is masked, and a response ends at its first end-of-turn token, so neither the
    batch nor the padding token changes a response (up to the rounding of batched arithmetic). Training mode is as
    before afterwards. `label` names the progress bar; None for no bar. `chat_template_kwargs` go to the chat template,
    as `{"enable_thinking": False}`; `system` is a system prompt before each. A model's thoughts stand in its response
    between `<think>` and `</think>`; `answer_of` cuts them. ConfigError as `tokenized` and `check_vocabulary`.
    """
    tokens = tokenized(tokenizer, prompts, settings=chat_template_kwargs, system=system)
    check_vocabulary(model, tokens)
    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "label": label}
    said = [response.text for response in respond(model, text_part(tokenizer), tokens, **sizes)]
    tell_unfinished(said)
    return said


def tokenized(
    tokenizer: Any,
    prompts: Sequence[str],
    template: str | None = None,
    settings: Mapping[str, Any] | str | None = None,
    *,
    system: str | None = None,
) -> list[list[int]]:
    """Return the token ids of each prompt as a user's turn, up to where the model's own turn begins.

    In the chat template of a tokenizer or a processor, which writes the special tokens itself and is given `settings`,
    after a system prompt where one is given; or in `template`, a text that holds `{prompt}`, between the tokenizer's
    own special tokens. ConfigError where there is neither, and where the model would be asked something else than the
    prompt.
    """
    settings = template_settings(settings)
    text = text_part(tokenizer)
    for place, prompt in enumerate(prompts, 1):
        check_whole(prompt, f"prompt {place} of {len(prompts)}")
    if template is None:
        texts = questions(text, prompts, {**inherited(tokenizer), **settings}, system)
        tokens = text(texts, add_special_tokens=False)["input_ids"] if texts else []
    else:
        if PLACE not in template:
            raise ConfigError(f"template {template!r} has no place for the prompt: put {PLACE} where it goes")
        if settings:
            raise ConfigError(
                f"chat_template_kwargs {settings} are read by a chat template, and `template` stands in its place: "
                "give one of the two"
            )
        texts = [template.replace(PLACE, prompt) for prompt in prompts]
        tokens = [_begun_once(text, ids) for ids in text(texts)["input_ids"]] if texts else []
    check_tokens_differ(prompts, tokens)
    return tokens


def check_vocabulary(model: Any, tokens: Iterable[Sequence[int]]) -> None:
    """Raise ConfigError for a token that the model has no row for: the tokenizer is another model's."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    highest = max((max(ids, default=0) for ids in tokens), default=0)
    if rows is not None and highest >= rows:
        raise ConfigError(
            f"the tokenizer gives token {highest}, and the model has rows for {rows}: give the tokenizer of this model"
        )


def _begun_once(tokenizer: Any, ids: list[int]) -> list[int]:
    """Without the beginning that a template of one's own writes and the tokenizer then writes again."""
    begin = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids


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
    """Return the greedy response to each sequence of token ids, in their order and at the cost of `generate`.

    The settings are those of `continuations`.
    """
    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "label": label}
    said = continuations(model, tokenizer, tokens, **sizes, synced=synced)
    return responses_of(model, tokenizer, tokens, said)


def responses_of(
    model: Any, tokenizer: Any, tokens: Sequence[Sequence[int]], said: Sequence[Sequence[int]]
) -> list[Response]:
    """Return what `continuations` gave as responses: as text, the thoughts marked, the end of the turn left out."""
    ends = end_tokens(model, tokenizer)
    spoken = [ids[:-1] if ids and ids[-1] in ends else ids for ids in said]
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in spoken]
    return [
        Response(with_marks(tokenizer, prompt, ids, text), len(ids))
        for prompt, ids, text in zip(tokens, spoken, texts, strict=True)
    ]


def continuations(
    model: Any,
    tokenizer: Any,
    tokens: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 40,
    batch_size: int = 32,
    label: str | None = None,
    synced: bool | None = None,
) -> list[list[int]]:
    """Return the token ids that the model says after each sequence, greedily, in their order; a pass as `generate`.

    At most `max_new_tokens` of each, up to and with the token that ends the turn. `synced` goes on until every rank has
    finished, which a model needs whose forward pass takes all ranks; None lets transformers find out.
    """
    said: list[list[int]] = [[] for _ in tokens]
    ends = end_tokens(model, tokenizer)
    sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    with evaluating(model):
        answers = _answers(model, tokens, ends, synced, **sizes)
        for i, answer in under_bar(answers, label, len(tokens)):
            stop = next((at + 1 for at, token in enumerate(answer) if token in ends), len(answer))
            said[i] = answer[:stop]
    return said


def _answers(
    model: Any,
    tokens: Sequence[Sequence[int]],
    ends: list[int],
    synced: bool | None,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[tuple[int, list[int]]]:
    """Yield each place and the token ids said there, as they come: by our own decoding where that is the same."""
    from .greedy import beginning_of, continued, plain_decoder

    decoder = plain_decoder(model) if tokens and alone(synced) else None
    beginning = beginning_of(decoder, tokens) if decoder is not None else None
    if beginning is not None:
        yield from continued(beginning, tokens, ends, max_new_tokens, batch_size)
        return
    for batch in alike_lengths([len(ids) for ids in tokens], batch_size):
        prompts = [tokens[i] for i in batch]
        yield from zip(batch, _continue(model, prompts, ends, max_new_tokens, synced), strict=True)


def under_bar(items: Iterable[Item], label: str | None, total: int | None = None) -> Iterable[Item]:
    """Return the items, with a progress bar of that name while they are gone through; None for no bar.

    `total`: how many there are, where they do not know.

    Only where there is a terminal.
    """
    from tqdm import tqdm

    return tqdm(items, desc=label, total=total, disable=label is None or not bars_shown())


def alike_lengths(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the places of alike lengths in batches: little padding.

    The longest come first, so that memory fails at once or not at all.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


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


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens of which each ends the model's turn: as its generation settings say, else its tokenizer."""
    ends: int | Iterable[int] | None = model.generation_config.eos_token_id or tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def _continue(
    model: Any, tokens: Sequence[Sequence[int]], ends: list[int], max_new_tokens: int, synced: bool | None
) -> list[list[int]]:
    """Return the new token ids, at most max_new_tokens, that `generate` gives after `tokens`, of one batch.

    Padded on the left with id 0; what follows a row's end means nothing.
    """
    import torch

    longest = max(map(len, tokens))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in tokens], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in tokens], device=model.device)
    # The model's own class of settings: this floor does not import transformers.
    greedy = type(model.generation_config)(**GREEDY, max_new_tokens=max_new_tokens, eos_token_id=ends or None)
    with torch.no_grad():
        said = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, synced_gpus=synced)
    new: list[list[int]] = said[:, longest:].tolist()
    return new


def alone(synced: bool | None) -> bool:
    """Whether no other process waits for this one's passes; not known (None) is alone in one process."""
    import torch.distributed as dist

    many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return not (many if synced is None else synced)
