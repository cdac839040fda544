"""What is evaluated: a model, or a LoRA adapter on its base."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..adapters import load_adapter
from ..adapters.files import CONFIG, adapter_folder
from ..errors import ConfigError
from ..io.addresses import address_of
from .hub import hub_file
from .loading import accelerator, load_pretrained


class Subject(NamedTuple):
    """A model on its device, its tokenizer, and what it was loaded from: `adapter` None for a plain model."""

    model: Any
    tokenizer: Any
    base: str
    adapter: str | None


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
    who = f"base of adapter {source!r}" if adapter else "model"
    model, tokenizer = load_pretrained(where, who=who, revision=revision, dtype=dtype)
    if adapter:
        model, tokenizer = _with_adapter(model, tokenizer, adapter)
    if not tokenizer.chat_template:
        raise ConfigError(f"{where!r} has no chat template: evaluate a chat or instruct model, or an adapter of one")
    return Subject(model.to(accelerator(device)).eval(), tokenizer, str(where), adapter)


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
