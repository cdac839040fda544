"""The two files of a PEFT adapter folder: found here or on the Hub, and written together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import AdapterError
from ..io.addresses import address_of, fetched
from ..io.documents import read_json
from ..io.file_faults import reading_fault
from ..io.paths import as_path
from ..io.whole_file import settle, whole_file, whole_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


# How text becomes tokens and back, as a training saves it beside the adapter; each file may be absent.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)


def adapter_folder(source: str | Path, revision: str | None = None) -> Path:
    """Return a folder that holds both adapter files: `source` itself, or what the Hub has, `org/name[@revision]`.

    An existing path wins over a Hub id of the same spelling. Raises AdapterError when a file is missing or pickled.
    """
    with suppress(OSError):
        settle(as_path(source, "adapter", error=AdapterError))
    address = address_of(source, "adapter", error=AdapterError, revision=revision)
    folder = fetched(
        address, (CONFIG, WEIGHTS, *TOKENIZER, "additional_chat_templates/*"), "adapter", error=AdapterError
    )
    _require_files(folder, f"adapter {str(source)!r}")
    return folder


def saved_adapter(folder: Path, adapter: str) -> Path:
    """Return where PEFT saves the adapter of this name in `folder`: there for `default`, else in a folder named so."""
    return folder if adapter == "default" else folder / adapter


def read_config(path: Path, where: str) -> dict[str, Any]:
    """Return adapter_config.json; raises AdapterError when it is not a JSON object."""
    config = read_json(path, f"{where}: {CONFIG}", error=AdapterError, advice="Fetch or save it again.")
    if not isinstance(config, dict):
        raise AdapterError(f"{where}: {CONFIG} holds a {type(config).__name__}, not a PEFT config.")
    return config


def write_folder(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Write both files, whole, and return `folder`; in a folder that is there already the others stay.

    At no moment does a loader find one of the old and one of the new: a folder whose config stays as it is has its
    weights replaced, and nothing else. Raises AdapterError when `folder` is a file or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"adapter folder {str(folder)!r} is a file; give another folder.")
    try:
        settle(folder, clean=True)
        if _configured(folder, config):
            with whole_file(folder / WEIGHTS) as part:
                save_file(dict(tensors), part, metadata={"format": "pt"})
            return folder
        with whole_folder(folder, into=True) as aside:
            aside.mkdir(parents=True)
            save_file(dict(tensors), aside / WEIGHTS, metadata={"format": "pt"})
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (aside / CONFIG).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"adapter folder {str(folder)!r} cannot be written: {error}") from error
    return folder


def _configured(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder holds this very config."""
    try:
        return bool(json.loads((folder / CONFIG).read_text(encoding="utf-8")) == json.loads(json.dumps(config)))
    except (OSError, ValueError):
        return False


def _require_files(folder: Path, where: str) -> None:
    if not folder.is_dir():
        raise AdapterError(f"{where} is a file; give the folder that holds {CONFIG} and {WEIGHTS}.")
    try:
        there = {path.name for path in folder.iterdir() if path.is_file()}
        nested = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    except OSError as error:
        raise AdapterError(f"{where} {reading_fault(folder, error)}") from error
    missing = [name for name in (CONFIG, WEIGHTS) if name not in there]
    if not missing:
        return
    pickled = Path(WEIGHTS).with_suffix(".bin").name in there
    model = bool(there & {"model.safetensors", "model.safetensors.index.json"})
    advice = "Only safetensors are read: give a PEFT adapter folder or a Hub id of one."
    if pickled:
        advice = "It has pickled weights (.bin), which can run code and are never read: save it again with PEFT."
    elif model:
        advice = "It holds a whole model, not an adapter."
    elif nested:
        advice = f"It has adapters in folders of their own ({', '.join(nested)}): give one of those."
    raise AdapterError(f"{where} has no {' and no '.join(missing)}. {advice}")
