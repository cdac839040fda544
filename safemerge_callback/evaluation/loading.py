"""Models of a folder or of the Hub, for judging and for being judged: safetensors only, and no code is run.

The only file of this floor that imports transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..io.addresses import address_of

# What pads where a tokenizer names nothing: a token that text does not hold, else the end of a turn.
_SPARE = ("<|finetune_right_pad_id|>", "<unk>")


def load_pretrained(
    source: str | Path,
    *,
    who: str,
    kind: str = "AutoModelForCausalLM",
    revision: str | None = None,
    dtype: Any = "auto",
) -> tuple[Any, Any]:
    """Return model (an Auto class of transformers, by its name) and tokenizer, on the CPU, in evaluation mode.

    `source` is a folder, or `org/name[@revision]` on the Hub. Only safetensors are read, and code in the checkpoint is
    refused. Raises ConfigError that begins with `who` where it cannot be loaded, with what to do about it.
    """
    import transformers

    place, options = _options(source, who, revision)
    try:
        model = getattr(transformers, kind).from_pretrained(place, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _refused(who, source, error) from error
    return model.eval(), load_tokenizer(source, who=who, revision=revision)


def load_tokenizer(source: str | Path, *, who: str, revision: str | None = None) -> Any:
    """Load a tokenizer, with a token that pads; raises as `load_pretrained`."""
    from transformers import AutoTokenizer

    place, options = _options(source, who, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _refused(who, source, error) from error
    _pad(tokenizer)
    return tokenizer


def _options(source: str | Path, who: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """What transformers calls the place that `source` names, and the options that it takes for it."""
    address = address_of(source, f"{who}:", error=ConfigError, revision=revision)
    place = address.repo if address.path is None else str(address.path)
    return place, {"revision": address.revision or "main", "trust_remote_code": False}


def accelerator(device: str | None = None) -> Any:
    """Return the torch.device named, else the accelerator there is, else the CPU."""
    import torch

    if device is not None:
        return torch.device(device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _pad(tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        spare = next((token for token in _SPARE if token in vocabulary), None)
        tokenizer.pad_token = spare or tokenizer.unk_token or tokenizer.eos_token


def _refused(who: str, source: str | Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{who} cannot load {str(source)!r} ({_first_line(error)}). Give a folder with safetensors; or, for a model on "
        "the Hub, accept the terms on its page if it has any, log in with `hf auth login`, and be online"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
