"""The evidence file beside an adapter: what `safemerge gate` decided, of what, and whether all of that is still so.

Plain JSON; docs/gate.md names the keys. It shows what has changed since. It is no signature: who writes the file anew
writes its digest anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..adapters.files import CONFIG, WEIGHTS, read_config
from ..errors import ConfigError, SafeMergeError, shown
from ..evaluation.acceptance import Thresholds, decide, ruling_rows
from ..evaluation.digests import template_digest, texts_digest
from ..evaluation.figures_file import figures_of, is_counted
from ..evaluation.loading import load_tokenizer
from ..evaluation.prompts import USER_FILE, load_prompts
from ..io.addresses import address_of, identity, source_name, without_folders
from ..io.documents import read_json
from ..io.hub import cached_folder
from ..io.outputs import FileKind, new_output
from ..subspace.file_address import cached_file
from .journal import JOURNAL_FILE, read_journal

NAME = "safemerge_evidence.json"
FORMAT, VERSION = "safemerge_evidence", 1
KIND = FileKind(
    "an evidence file of ours", lambda head: head.split()[:3] == [b"{", b'"format":', b'"safemerge_evidence",']
)
# Its tokenizer counts by the digest of its template.
_BASE_FILES = ("config.json", "*.safetensors")
_KEYS = ("adapter", "base_model", "subspace", "settings", "sets", "template", "thresholds", "rulings", "figures")
_RULED = ("rule", "limit", "measure", "outcome")
State = Literal["same", "changed", "absent"]


class Check(NamedTuple):
    """Something that the evidence names: `same` as it was, `changed`, or `absent` here, so that it cannot be told."""

    what: str
    state: State
    words: str

    def __str__(self) -> str:
        """Such as `same     adapter_model.safetensors`."""
        return f"{self.state:<8} {self.what}{f': {self.words}' if self.words else ''}"


def adapter_evidence(adapter: Path) -> dict[str, Any]:
    """Return an evidence's adapter, and the subspace that the journal beside it names, by digest as they are now."""
    subspace = _subspace(adapter)
    return {
        "adapter": {"name": adapter.resolve().name, "files": file_digests(adapter, (CONFIG, WEIGHTS))},
        "subspace": None if subspace is None else {"name": source_name(subspace), "header": _header_digest(subspace)},
    }


def base_evidence(adapter: Path, base: str | None) -> dict[str, Any]:
    """Return an evidence's base, by digest as it is now: `base`, or what the adapter's config names.

    Read where it lies here or in the Hub's cache, where it is once it was loaded.
    """
    named = _base_named(adapter, base)
    folder = _base_folder(named)
    name, revision = (named and source_name(named), None) if folder is None else identity(folder)
    return {"base_model": {"name": name, "revision": revision, "files": file_digests(folder, _BASE_FILES)}}


def write_evidence(adapter: Path, document: Mapping[str, Any]) -> Path:
    """Write the evidence beside an adapter, whole or not at all; no folder of this machine is in it.

    ConfigError where another file has its name, or the folder takes none.
    """
    when = datetime.now(UTC).isoformat(timespec="seconds")
    portable = _without_folders({"format": FORMAT, "version": VERSION, "time": when, **document})
    with new_output(adapter / NAME, "evidence", KIND) as part:
        part.write_text(
            json.dumps({**portable, "digest": document_digest(portable)}, indent=2) + "\n", encoding="utf-8"
        )
    return adapter / NAME


def read_evidence(adapter: Path) -> dict[str, Any]:
    """Return the evidence beside an adapter; ConfigError where there is none, or it is of another format."""
    who = f"evidence {shown(adapter / NAME)}"
    if not (adapter / NAME).is_file():
        raise ConfigError(f"{who} is not there: `safemerge gate ADAPTER --evidence` writes it")
    document = read_json(adapter / NAME, who)
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        raise ConfigError(f"{who} is not of format {FORMAT!r}, version {VERSION}: write it anew with --evidence")
    lacking = [key for key in _KEYS if key not in document]
    if lacking:
        raise ConfigError(f"{who} lacks {lacking}: write it anew with --evidence")
    return document


def evidence_checks(
    adapter: Path, document: Mapping[str, Any], base: str | None, probes: Sequence[str] | None = None
) -> Iterator[Check]:
    """Give a check for each thing that the evidence names, without loading a model; of itself alone if that changed.

    `base`: where the base lies, None where it is what the adapter's config names. `probes`: prompt sets as
    `load_prompts` has them, to look at files of one's own, too; None takes the named sets that are here.
    """
    rest = {key: value for key, value in document.items() if key != "digest"}
    whole = _compared(NAME, document.get("digest") or "-", document_digest(rest))
    yield whole
    # What was written by hand need not have what the rest looks at.
    if whole.state == "changed":
        return
    yield from _files("", document["adapter"]["files"], file_digests(adapter, (CONFIG, WEIGHTS)), "changed")
    folder = _base_folder(_base_named(adapter, base))
    # The Hub's cache may have a part of it.
    elsewhere = folder is None or identity(folder)[1] is not None
    missing: State = "absent" if elsewhere else "changed"
    yield from _files("base ", document["base_model"]["files"], file_digests(folder, _BASE_FILES), missing)
    yield from _subspace_check(adapter, document["subspace"])
    yield _compared("chat template", document["template"], _template(adapter, folder))
    yield from _prompt_checks(document, probes)
    yield from _decision_checks(document)


def document_digest(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a document of plain values: of its JSON with keys in order, in ASCII, without blanks."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def file_digests(folder: Path | None, patterns: Sequence[str]) -> dict[str, str]:
    """Return name -> SHA-256 of the files of a folder that match, in order; nothing for no folder."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)}) if folder is not None else []
    digests = {}
    for path in paths:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _compared(what: str, then: Any, now: Any) -> Check:
    """A check of two digests; where there is none now, or was none, nothing can be told."""
    if not then or not now:
        return Check(what, "absent", "was not known" if not then else "is not here")
    return Check(what, "same", "") if then == now else Check(what, "changed", "is not what was asked")


def _files(whose: str, then: Mapping[str, str], now: Mapping[str, str], missing: State) -> Iterator[Check]:
    """A check a file, `missing` what one is that is not here; one check where none was known, or may be here."""
    if not then or (not now and missing == "absent"):
        yield _compared(f"{whose}weights", then, now)
        return
    for name in sorted(then.keys() | now.keys()):
        if name in then and name in now:
            yield _compared(f"{whose}{name}", then[name], now[name])
        elif name in then:
            yield Check(f"{whose}{name}", missing, "is gone" if missing == "changed" else "is not here")
        else:
            yield Check(f"{whose}{name}", "changed", "was not there")


def _base_named(adapter: Path, base: str | None) -> str | None:
    """What the base is called: `base`, or what the adapter's config says; None where that cannot be read."""
    if base is not None:
        return base
    with suppress(SafeMergeError):
        named = read_config(adapter / CONFIG, f"adapter {shown(adapter)}").get("base_model_name_or_path")
        return named if isinstance(named, str) else None
    return None


def _base_folder(named: str | None) -> Path | None:
    """Where the base's files lie on this machine; None where they do not. Nothing is fetched."""
    try:
        address = address_of(str(named), "base", error=ConfigError)
    except SafeMergeError:
        return None
    folder = cached_folder(address.repo, address.revision) if address.path is None else address.path
    return folder if folder is not None and folder.is_dir() else None


def _subspace(adapter: Path) -> Path | None:
    """The subspace file that the journal beside the adapter names, there or not."""
    with suppress(SafeMergeError):
        entries = read_journal(adapter / JOURNAL_FILE) if (adapter / JOURNAL_FILE).is_file() else []
        sources = [entry.get("subspace") for entry in entries if entry.get("kind") == "start"]
        path = sources[-1].get("path") if sources and isinstance(sources[-1], Mapping) else None
        return Path(path) if isinstance(path, str) else None
    return None


def _header_digest(path: Path) -> str | None:
    """The digest of a safetensors file's header, which holds the checksums of all its tensors; None without a file.

    One of the Hub is looked for in its cache.
    """
    there = path if path.is_file() else cached_file(str(path))
    if there is None:
        return None
    with there.open("rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()


def _subspace_check(adapter: Path, then: Mapping[str, Any] | None) -> Iterator[Check]:
    if then is not None:
        path = _subspace(adapter)
        yield _compared(f"subspace {then['name']}", then["header"], None if path is None else _header_digest(path))


def _template(adapter: Path, base: Path | None) -> str:
    """The digest of the template that `load_subject` would ask in: the base's, else that beside the adapter.

    Nothing where the base is not here: that beside the adapter may be another.
    """
    for folder in (base, adapter) if base is not None else ():
        if (folder / "tokenizer_config.json").is_file():
            digest = template_digest(load_tokenizer(folder, who="tokenizer"))
            if digest:
                return digest
    return ""


def _prompt_checks(document: Mapping[str, Any], probes: Sequence[str] | None) -> Iterator[Check]:
    settings, sets = document["settings"], document["sets"]
    named = [one["name"] for one in sets if one["licence"] != USER_FILE]
    digests = {}
    for probe in named if probes is None else probes:
        with suppress(SafeMergeError):
            prompts = load_prompts(probe, settings["n"], settings["seed"], online=False)
            digests[prompts.name] = texts_digest(prompts.prompts)
    for one in sets:
        yield _compared(f"prompts {one['name']}", one["digest"], digests.get(one["name"]))


def _decision_checks(document: Mapping[str, Any]) -> Iterator[Check]:
    """Whether the figures are what their outcomes come to, and the rulings what the figures do."""
    figures, base = evidence_figures(document)
    odd = [one["measure"] for one in [*figures, *(base or ())] if not is_counted(one)]
    words = f"{odd} do not follow from their outcomes" if odd else ""
    yield Check("figures", "changed" if odd else "same", words)
    rulings = ruling_rows(decide(figures, Thresholds(**document["thresholds"]), base))
    # A reason is words, which another release may choose otherwise.
    then, now = ([[row[key] for key in _RULED] for row in rows] for rows in (document["rulings"], rulings))
    yield Check("rulings", *(("same", "") if then == now else ("changed", "are not what the figures come to")))


def evidence_figures(document: Mapping[str, Any]) -> tuple[list[Any], list[Any] | None]:
    """Return the figures of an evidence, and those of its base; ConfigError for what are none."""
    who = f"evidence of {shown(document['adapter']['name'])}"
    base = document.get("base_figures")
    return figures_of(document["figures"], who), None if base is None else figures_of(base, f"{who}, base")


def _without_folders(value: Any) -> Any:
    """The value, each absolute path in its texts cut to its last part."""
    if isinstance(value, str):
        return without_folders(value)
    if isinstance(value, Mapping):
        return {key: _without_folders(one) for key, one in value.items()}
    return [_without_folders(one) for one in value] if isinstance(value, list | tuple) else value
