"""Greedy decoding of many prompts: what all begin with is computed once, and rows that end make room for others.

Cost: a forward pass for the beginning, one a portion of prompts, and one a token of those that are under way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..live.forward import forward_keywords

# What a pass here is given; a model that takes less of it, or positions of another kind, says what comes next itself.
_NEEDED = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
# What transformers' own generation does for a model, unless its class does it otherwise.
_STEPS = (
    "generate",
    "prepare_inputs_for_generation",
    "_prepare_position_ids_for_generation",
    "_update_model_kwargs_for_generation",
)
# What generation settings may say without a greedy response depending on it.
_HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"),
    *("output_attentions", "output_hidden_states", "transformers_version", "_from_model_config"),
}
# What is often written down and changes nothing at these values.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}


# Tokens of prompts in one pass: from here on a processor's products do not get quicker by being larger.
_PORTION = 512


class Beginning(NamedTuple):
    """The first `length` tokens of every prompt, computed: the decoder that did it and its cache of one row.

    `cache` is None where prompts have no token in common.
    """

    decoder: Any
    length: int
    cache: Any


def plain_decoder(model: Any) -> Any | None:
    """Return the transformers model inside `model` whose greedy responses `continued` gives as its `generate` would.

    None where they may be others, or cost more: an encoder before the decoder, attention to a window, mixtures of
    experts, a state in place of a cache, virtual tokens, several devices, settings that change a score, or a class that
    generates in its own way.
    """
    decoder = _within_peft(model)
    if decoder is None or any("generate" in vars(one) for one in (model, decoder)):
        return None
    config = decoder.config.get_text_config()
    kinds = {"full_attention", *(getattr(config, "layer_types", None) or ())}
    ordinary = (
        not decoder.config.is_encoder_decoder
        and kinds == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and getattr(config, "_experts_implementation", None) in (None, "eager")
        and getattr(config, "_attn_implementation", None) in ("eager", "sdpa")
        and all(_is_of_transformers(decoder, name) for name in _STEPS)
        and forward_keywords(decoder) >= _NEEDED
        and _is_greedy(decoder.generation_config.to_diff_dict())
        and {parameter.device for parameter in decoder.parameters()} == {decoder.device} != {torch.device("meta")}
    )
    return decoder if ordinary else None


def _within_peft(model: Any) -> Any | None:
    """The model that PEFT has wrapped; None where its adapter is no change of layers alone."""
    if not hasattr(model, "get_base_model"):
        return model
    config = model.active_peft_config
    more = config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None)
    return None if more else model.get_base_model()


def _is_greedy(settings: Mapping[str, Any]) -> bool:
    """Whether the likeliest token is said, once what only sampling reads is set aside."""
    read = {name: value for name, value in settings.items() if name not in _HARMLESS and value is not None}
    return all(name in _NEUTRAL and _NEUTRAL[name] == value for name, value in read.items())


def _is_of_transformers(decoder: Any, name: str) -> bool:
    method = getattr(type(decoder), name, None)
    return method is None or method.__module__ == "transformers.generation.utils"


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with alike, so that one at least is left to each of them."""
    most = min(map(len, prompts)) - 1
    return next((place for place in range(most) if len({prompt[place] for prompt in prompts}) > 1), most)


def beginning_of(decoder: Any, prompts: Sequence[Sequence[int]]) -> Beginning | None:
    """Return what all prompts begin with, computed in one pass of one row; a token is left to each of them.

    None where the decoder keeps anything else than keys and values of all tokens.
    """
    length = common_length(prompts)
    ids = torch.tensor([[*prompts[0][: max(length, 1)]]], device=decoder.device)
    cache = _pass(decoder, ids, torch.ones_like(ids), None).past_key_values
    layers = getattr(cache, "layers", ())
    ordinary = {type(layer).__name__ for layer in layers} == {"DynamicLayer"}
    if not ordinary or any(layer.get_seq_length() != ids.shape[1] for layer in layers):
        return None
    return Beginning(decoder, length, cache if length else None)


@dataclass
class Rows:
    """Rows under way: `prompts`, their places (n); `words` (n,), int64, what each said last, which is not in the cache.

    `mask` (n, length), int64, tells tokens from padding in `cache`, and `spans` (n) from which column on, counted from
    the end, a row has tokens.
    """

    prompts: list[int]
    words: Tensor
    mask: Tensor
    cache: Any
    spans: list[int]


def continued(
    beginning: Beginning, prompts: Sequence[Sequence[int]], ends: Sequence[int], max_new_tokens: int, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield each prompt's place and what the decoder says after it, greedily, as it ends; the longest prompts begin.

    At most `max_new_tokens` each, up to and with one of `ends`. At most `batch_size` rows are under way, in no more
    columns than the longest needs. The host waits for the device once a token.
    """
    said: list[list[int]] = [[] for _ in prompts]
    waiting = portions([len(prompt) - beginning.length for prompt in prompts], batch_size)
    rows: Rows | None = None
    while waiting or rows is not None:
        if rows is not None:
            _say_next(beginning.decoder, rows)
        while waiting and (rows is None or len(rows.prompts) + len(waiting[0]) <= batch_size):
            rows = _joined(rows, _begun(beginning, prompts, waiting.pop(0)))
        assert rows is not None, "a portion has at most batch_size rows"
        left = []
        for row, (place, word) in enumerate(zip(rows.prompts, rows.words.tolist(), strict=True)):
            said[place].append(word)
            if word in ends or len(said[place]) == max_new_tokens:
                yield place, said[place]
            else:
                left.append(row)
        rows = _kept(rows, left)


def portions(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the places of alike lengths, the longest first, in portions that go through the model at once.

    A portion is a quarter of a batch at most, so that it finds room before all others have ended, and has about
    `_PORTION` tokens.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    all_portions = []
    while order:
        size = max(1, min(_PORTION // lengths[order[0]], -(-batch_size // 4)))
        all_portions.append(order[:size])
        del order[:size]
    return all_portions


def _begun(beginning: Beginning, prompts: Sequence[Sequence[int]], places: list[int]) -> Rows:
    """The rows of these prompts with their first words; what follows the beginning is padded on the left with id 0."""
    decoder, length, _ = beginning
    rests = [list(prompts[place][length:]) for place in places]
    widest = max(map(len, rests))
    ids = [[0] * (widest - len(rest)) + rest for rest in rests]
    seen = [[1] * length + [0] * (widest - len(rest)) + [1] * len(rest) for rest in rests]
    mask = torch.tensor(seen, device=decoder.device)
    outputs = _pass(decoder, torch.tensor(ids, device=decoder.device), mask, _repeated(beginning, len(places)))
    return Rows(places, _likeliest(outputs), mask, outputs.past_key_values, [length + widest] * len(places))


def _say_next(decoder: Any, rows: Rows) -> None:
    """One token more of each row."""
    rows.mask = torch.cat([rows.mask, rows.mask.new_ones(len(rows.prompts), 1)], 1)
    rows.words = _likeliest(_pass(decoder, rows.words.unsqueeze(1), rows.mask, rows.cache))
    rows.spans = [span + 1 for span in rows.spans]


def _joined(rows: Rows | None, others: Rows) -> Rows:
    """Both as one, in the former's cache: what is narrower is padded on the left."""
    if rows is None:
        return others
    width = max(rows.mask.shape[1], others.mask.shape[1])
    for layer, other in zip(rows.cache.layers, others.cache.layers, strict=True):
        layer.keys = torch.cat([_widened(layer.keys, width, -2), _widened(other.keys, width, -2)])
        layer.values = torch.cat([_widened(layer.values, width, -2), _widened(other.values, width, -2)])
    mask = torch.cat([_widened(rows.mask, width, -1), _widened(others.mask, width, -1)])
    words = torch.cat([rows.words, others.words])
    return Rows([*rows.prompts, *others.prompts], words, mask, rows.cache, [*rows.spans, *others.spans])


def _kept(rows: Rows, left: list[int]) -> Rows | None:
    """These of the rows, without the columns that none of them has; None where there are none."""
    if len(left) == len(rows.prompts) or not left:
        return rows if left else None
    which = torch.tensor(left, device=rows.words.device)
    spans = [rows.spans[row] for row in left]
    rows.cache.batch_select_indices(which)
    for layer in rows.cache.layers:
        layer.keys, layer.values = layer.keys[..., -max(spans) :, :], layer.values[..., -max(spans) :, :]
    mask = rows.mask[which, -max(spans) :]
    return Rows([rows.prompts[row] for row in left], rows.words[which], mask, rows.cache, spans)


def _widened(tensor: Tensor, width: int, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([tensor.new_zeros(shape), tensor], dim) if shape[dim] else tensor


def _likeliest(outputs: Any) -> Tensor:
    """The next token of each row (n,); in float32 as in transformers: of what float64 alone tells apart, the first."""
    words: Tensor = outputs.logits[:, -1].float().argmax(-1)
    return words


def _pass(decoder: Any, ids: Tensor, mask: Tensor, cache: Any) -> Any:
    """One forward pass over `ids` (n, t) after what is in the cache; `mask` (n, all) tells tokens from padding."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    with torch.no_grad():
        return decoder(**inputs, use_cache=True, logits_to_keep=1, return_dict=True)


def _repeated(beginning: Beginning, rows: int) -> Any:
    """A new cache of so many rows, each of which has the beginning; None where there is none."""
    if beginning.cache is None:
        return None
    cache = type(beginning.cache)()
    for place, layer in enumerate(beginning.cache.layers):
        keys, values = (one.expand(rows, *one.shape[1:]) for one in (layer.keys, layer.values))
        cache.update(keys, values, place)
    return cache
