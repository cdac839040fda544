"""Where a checkpoint's safetensors files are: a folder, one file, or a model on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import SubspaceError
from ...io.addresses import address_of, identity
from ...io.documents import parse_json
from ...io.hub import cached_folder, find_commit
from .shard_files import Folder, LocalFile, LocalFolder, ShardFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_REFUSED = {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"}


class Located(NamedTuple):
    """A checkpoint's files: `name` and `revision` say which model without saying where it lies on this machine.

    `listed` is the index's map from tensor to file, and `config` what config.json holds; both are empty without one.
    """

    name: str
    revision: str | None
    files: tuple[ShardFile, ...]
    listed: Mapping[str, str] = {}
    config: Mapping[str, Any] = {}

    @property
    def architecture(self) -> str | None:
        """The `model_type` of config.json; None where there is none."""
        model_type = self.config.get("model_type")
        return model_type if isinstance(model_type, str) else None


def locate(source: str | Path, revision: str | None = None) -> Located:
    """Return the safetensors files of a folder, a single `.safetensors` file, or a Hub id, `org/name[@revision]`.

    An existing path always wins over a Hub id of the same spelling. Pickle and GGUF files are never read. Raises
    SubspaceError when nothing is there, when only refused formats are, or when a listed shard is missing.
    """
    address = address_of(source, "checkpoint", error=SubspaceError, revision=revision, kind="folder or file")
    path = address.path
    if path is None:
        return _on_hub(address.repo, address.revision)
    if path.is_file():
        files = (LocalFile(_one_file(path)),)
        return Located(path.name, revision, files, config=_config(LocalFolder(path.parent), str(source)))
    return _located(*identity(path, revision), LocalFolder(path), str(source))


def _on_hub(repo: str, revision: str | None) -> Located:
    """The newest commit of `revision`, from the Hub's cache where all of it is there, else read over the network."""
    from .hub import HubFolder

    commit = find_commit(repo, revision, "checkpoint", error=SubspaceError)
    cached = cached_folder(repo, commit.sha or revision)
    if cached is not None:
        try:
            return _located(repo, cached.name, LocalFolder(cached), repo)
        except SubspaceError:
            # Offline, what is in the cache is all there is; else it may hold a part, such as the tokenizer alone.
            if commit.sha is None:
                raise
    if commit.sha is None:
        raise SubspaceError(
            f"checkpoint {repo!r} is no folder here and could not be fetched from the Hub"
            f"{f' at revision {revision!r}' if revision else ''}: {commit.why}"
        )
    return _located(repo, commit.sha, HubFolder(repo, commit), repo)


def _located(name: str, revision: str | None, folder: Folder, source: str) -> Located:
    there = folder.names()
    listed = _listed(folder, source) if INDEX in there else {}
    chosen = _shards(listed, there, source) if INDEX in there else (_only_file(there, source),)
    return Located(name, revision, tuple(folder.shard(file) for file in chosen), listed, _config(folder, source, there))


def _config(folder: Folder, source: str, there: list[str] | None = None) -> dict[str, Any]:
    if "config.json" not in (folder.names() if there is None else there):
        return {}
    text = folder.text("config.json")
    config = parse_json(text, f"checkpoint {source!r}: config.json", error=SubspaceError, advice="Download it again.")
    return config if isinstance(config, dict) else {}


def _one_file(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise SubspaceError(
            f"checkpoint file {str(path)!r}: only .safetensors is read (pickle can run code, GGUF is quantised). "
            "Convert it with save_pretrained, or point to the original safetensors checkpoint."
        )
    return path


def _only_file(there: list[str], source: str) -> str:
    if SINGLE in there:
        return SINGLE
    candidates = [name for name in there if name.endswith(".safetensors") and not name.startswith("adapter_")]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise SubspaceError(
            f"checkpoint {source!r}: {len(candidates)} safetensors files but no {INDEX} that says which belong "
            "together. Download the index too, save the model again with save_pretrained, or give one file."
        )
    raise SubspaceError(f"checkpoint {source!r} {_why_nothing(there)}")


def _why_nothing(there: list[str]) -> str:
    if "adapter_model.safetensors" in there:
        return "holds a PEFT adapter, not a model: pass it as alignment_adapter, or merge it into its base first."
    refused = [name for name in there if Path(name).suffix in _REFUSED]
    if refused:
        return (
            f"has no safetensors weights, only {', '.join(refused[:3])}{' ...' if len(refused) > 3 else ''}: pickle "
            "and GGUF files are never read. Convert it with save_pretrained, or use a safetensors revision."
        )
    return (
        f"has neither {SINGLE} nor {INDEX} (pickle and GGUF files are never read): give the folder that holds the "
        "model's safetensors files, or a Hub id."
    )


def _listed(folder: Folder, source: str) -> dict[str, str]:
    """The index's map from tensor to file."""
    text = folder.text(INDEX)
    try:
        listed = parse_json(text, INDEX)["weight_map"]
        files = sorted(set(listed.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise SubspaceError(f"checkpoint {source!r}: {INDEX} is corrupt ({error}).") from error
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise SubspaceError(f"checkpoint {source!r}: {INDEX} lists {name!r}; only .safetensors files beside it.")
    return dict(listed)


def _shards(listed: Mapping[str, str], there: list[str], source: str) -> tuple[str, ...]:
    names = sorted(set(listed.values()))
    missing = [name for name in names if name not in there]
    if missing or not names:
        what = f"{len(missing)} of {len(names)} shards are missing, first {missing[0]!r}" if missing else "lists none"
        raise SubspaceError(f"checkpoint {source!r}: {INDEX}: {what}. Download the checkpoint again.")
    return tuple(names)
