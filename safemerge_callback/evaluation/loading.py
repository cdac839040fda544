"""Models of a folder or of the Hub, or a LoRA adapter on its base, for judging and for being judged.

Safetensors only, and no code is run.

The only file of this floor that imports transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..adapters import load_adapter
from ..adapters.files import CONFIG, adapter_folder
from ..errors import ConfigError
from ..io.addresses import address_of
from ..io.bars import bars_shown
from .hub import hub_file

# What pads where a tokenizer names nothing: a token that text does not hold, else the end of a turn.
_SPARE = ("<|finetune_right_pad_id|>", "<unk>")


class Subject(NamedTuple):
    """A model on its device, its tokenizer, and what it was loaded from: `adapter` None for a plain model."""

    model: Any
    tokenizer: Any
    base: str
    adapter: str | None


def load_subject(
    source: str, *, base: str | None = None, revision: str | None = None, dtype: Any = "auto", device: str | None = None
) -> Subject:
    """Load a model, or an adapter on its base, in evaluation mode on `device` (None: the accelerator, or the CPU).

    An adapter's base is `base`, or what its config names; `revision` is the base's, or the plain model's. Safetensors
    only. Raises ConfigError for a model and AdapterError for an adapter that cannot be loaded or evaluated.
    """
    adapter = source if base is not None or is_adapter(source) else None
    named = load_adapter(source).base_model if adapter else source
    where = base or named
    if not where:
        raise ConfigError(f"adapter {source!r} does not name its base model: give --base")
    named_by = "" if base else ", as its config names it,"
    who = f"base of adapter {source!r}{named_by}" if adapter else "model"
    model, tokenizer = load_pretrained(where, who=who, revision=revision, dtype=dtype)
    if adapter:
        model, tokenizer = _with_adapter(model, tokenizer, adapter)
    if not tokenizer.chat_template:
        raise ConfigError(f"{where!r} has no chat template: evaluate a chat or instruct model, or an adapter of one")
    return Subject(model.to(accelerator(device)).eval(), tokenizer, str(where), adapter)


def is_adapter(source: str) -> bool:
    """Whether a folder, or a repository of the Hub, holds a PEFT adapter; False where that cannot be found out."""
    address = address_of(source, "model", error=ConfigError)
    if address.path is not None:
        return (address.path / CONFIG).is_file()
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hub_file(address.repo, CONFIG, revision=address.revision)
    except (OSError, ValueError, EntryNotFoundError):
        # No such file, or the Hub is out of reach: loading it as a model says which.
        return False
    return True


def _with_adapter(model: Any, tokenizer: Any, adapter: str) -> tuple[Any, Any]:
    from peft import PeftModel

    from .loading import load_tokenizer

    folder = adapter_folder(adapter)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(f"adapter {adapter!r} does not fit its base ({reason}): give the right --base") from error
    # What a training saved beside the adapter is needed only where the base has none.
    if not tokenizer.chat_template and (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(folder, who=f"tokenizer of adapter {adapter!r}")
    return adapted, tokenizer


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
        with _bars_on_terminals():
            model = getattr(transformers, kind).from_pretrained(place, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _refused(who, source, error) from error
    return model.eval(), load_tokenizer(source, who=who, revision=revision)


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Let transformers draw progress where we would: of itself it does in a log file, too."""
    from transformers.utils import logging

    if bars_shown() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


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
