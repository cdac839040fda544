"""Where a checkpoint's safetensors files are: a folder, one file, or a model on the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from ..errors import SubspaceError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_REFUSED = {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CACHE_FOLDER = re.compile(r"models--(.+)")


class Located(NamedTuple):
    """A checkpoint's files: `name` and `revision` say which model without saying where it lies on this machine."""

    name: str
    revision: str | None
    files: tuple[Path, ...]


def locate(source: str | Path, revision: str | None = None) -> Located:
    """Return the safetensors files of a folder, a single `.safetensors` file, or a Hub id.

    An existing path always wins over a Hub id of the same spelling. Pickle and GGUF files are never read.
    Raises SubspaceError when nothing is there, when only refused formats are, or when a listed shard is missing.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return Located(path.name, revision, (_one_file(path),))
    if path.is_dir():
        return Located(*_identity(path, revision), _files_in(path, str(source)))
    if not _HUB_ID.fullmatch(str(source)):
        raise SubspaceError(f"checkpoint {str(source)!r}: no such folder or file, and not a Hub id such as 'org/name'.")
    folder = _download(str(source), revision)
    return Located(str(source), _identity(folder, revision)[1], _files_in(folder, str(source)))


def source_name(source: str | Path) -> str:
    """Return a name for `source` that holds no machine path: a Hub id as it is, a path's last part."""
    text = str(source)
    if Path(text).expanduser().exists():
        return _identity(Path(text).expanduser(), None)[0]
    return text if _HUB_ID.fullmatch(text) else Path(text).name


def _identity(folder: Path, revision: str | None) -> tuple[str, str | None]:
    """Name and revision of a folder; those of the model where the folder is a snapshot in the Hub's cache."""
    folder = folder.resolve()
    for parent in folder.parents[1:2]:
        match = _CACHE_FOLDER.fullmatch(parent.name)
        if match and folder.parent.name == "snapshots":
            return match[1].replace("--", "/", 1), folder.name
    return folder.name, revision


def _download(repo: str, revision: str | None) -> Path:
    """Fetch a Hub model's safetensors and JSON files; sub-folders and Mistral's second copy of the weights are left."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=["*.safetensors", "*.json"],
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (OSError, ValueError) as error:  # every error of the Hub's client is one of the two
        raise SubspaceError(
            f"checkpoint {repo!r} is no folder here and could not be fetched from the Hub"
            f"{f' at revision {revision!r}' if revision else ''}: {_first_line(error)}"
        ) from error
    return Path(folder)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _one_file(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise SubspaceError(
            f"checkpoint file {str(path)!r}: only .safetensors is read (pickle can run code, GGUF is quantised). "
            "Convert it with save_pretrained, or point to the original safetensors checkpoint."
        )
    return path


def _files_in(folder: Path, source: str) -> tuple[Path, ...]:
    if (folder / INDEX).is_file():
        return _listed_shards(folder / INDEX, source)
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    found = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
    if len(found) == 1:
        return (found[0],)
    if found:
        raise SubspaceError(f"checkpoint {source!r}: {len(found)} safetensors files but no {INDEX} that lists them.")
    raise SubspaceError(f"checkpoint {source!r} {_why_nothing(folder)}")


def _why_nothing(folder: Path) -> str:
    if (folder / "adapter_model.safetensors").is_file():
        return "holds a PEFT adapter, not a model: pass it as alignment_adapter, or merge it into its base first."
    refused = sorted(p.name for p in folder.iterdir() if p.suffix in _REFUSED)
    if refused:
        return (
            f"has no safetensors weights, only {', '.join(refused[:3])}{' ...' if len(refused) > 3 else ''}: pickle "
            "and GGUF files are never read. Convert it with save_pretrained, or use a safetensors revision."
        )
    return f"has neither {SINGLE} nor {INDEX} (pickle and GGUF files are never read)."


def _listed_shards(index: Path, source: str) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise SubspaceError(f"checkpoint {source!r}: {INDEX} is corrupt ({_first_line(error)}).") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise SubspaceError(f"checkpoint {source!r}: {INDEX} lists {name!r}; only .safetensors files beside it.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        what = f"{len(missing)} of {len(names)} shards are missing, first {missing[0]!r}" if missing else "lists none"
        raise SubspaceError(f"checkpoint {source!r}: {INDEX}: {what}. Download the checkpoint again.")
    return tuple(index.parent / name for name in names)
