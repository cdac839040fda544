"""The small files of a model: configuration, tokenizer, licence, and code of its own, which is copied and never run."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..adapters.files import TOKENIZER
from ..errors import ConfigError
from ..io.documents import read_json
from ..subspace.checkpoints.locate import INDEX

_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
# Folders that belong to a tokenizer.
_FOLDERS = ("additional_chat_templates",)
# Files of a tokenizer of which one holds its vocabulary.
_VOCABULARIES = {
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    "tekken.json",
}
# What the Hub is asked for, beside the weights.
PATTERNS = (INDEX, *(f"*{suffix}" for suffix in (*_COPIED, ".py")), *(f"{name}*" for name in _LICENCES))


def small_files(folder: Path) -> Iterator[Path]:
    """Yield the files and folders of a model that belong in a copy of it with other weights."""
    ends = _COPIED | ({".py"} if code_files(folder) else set())
    for path in sorted(folder.iterdir()):
        kept = path.suffix in ends or path.name.upper().startswith(_LICENCES)
        weights = path.name == INDEX or path.name.startswith("adapter_")
        if path.name in _FOLDERS if path.is_dir() else kept and not weights:
            yield path


def code_files(folder: Path) -> set[str]:
    """Return the names of the files of code beside a model that its configurations refer to (`auto_map`)."""
    files: set[str] = set()
    for path in folder.glob("*.json"):
        if path.name == INDEX or path.stat().st_size > 1 << 20:
            continue  # configurations are short; vocabularies and indexes are not
        try:
            config = read_json(path, f"base model's {str(path)!r}")
        except ConfigError:
            continue  # whoever needs it tells
        named = config.get("auto_map") if isinstance(config, dict) else None
        values = named.values() if isinstance(named, dict) else []
        texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
        # `org/name--file.Class` is code of another model, which stays where it is.
        files |= {f"{text.partition('.')[0]}.py" for text in texts if isinstance(text, str) and "--" not in text}
    return files


def copy_model(folder: Path, output: Path) -> None:
    """Copy the small files of a model into `output`; warn where code that it refers to is not there to copy."""
    for path in small_files(folder):
        _copy(path, output)
    missing = sorted(name for name in code_files(folder) if not (folder / name).is_file())
    if missing:
        warnings.warn(
            f"safemerge: the base model has code of its own (auto_map) and lacks {', '.join(missing)}: the baked model "
            "cannot be loaded before you put it there",
            stacklevel=5,
        )


def tokenizer_files(folder: Path | None) -> list[Path]:
    """Return the files of the tokenizer that lies in a folder, in any; none where there is no whole tokenizer."""
    files = [folder / name for name in TOKENIZER if (folder / name).exists()] if folder else []
    names = {path.name for path in files}
    return files if "tokenizer_config.json" in names and names & _VOCABULARIES else []


def copy_tokenizer(folder: Path | None, output: Path) -> bool:
    """Put the tokenizer of `folder` into `output` in the place of the one there; return whether there was one."""
    files = tokenizer_files(folder)
    for name in TOKENIZER if files else ():
        old = output / name
        if old.is_dir():
            shutil.rmtree(old)
        old.unlink(missing_ok=True)
    for path in files:
        _copy(path, output)
    return bool(files)


def _copy(path: Path, output: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, output / path.name)
    else:
        shutil.copyfile(path, output / path.name)
