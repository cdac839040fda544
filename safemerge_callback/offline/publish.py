"""An adapter folder on the Hub: its files without this machine's paths, and a card; one commit."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..adapters import Adapter, load_adapter
from ..adapters.files import CONFIG, TOKENIZER, WEIGHTS
from ..errors import AdapterError, shown
from ..io.addresses import identity
from ..io.card import TAG, card_head, caveat, completed, escaped, is_hub_id, section_in
from ..io.documents import read_json
from ..io.hub_upload import CARD_FILE, Destination, check_destination, upload
from ..io.paths import as_path, existing
from ..record import JOURNAL_FILE
from ..record.evidence import NAME as EVIDENCE_FILE
from ..record.evidence import file_digests

SAFETY_TAG = "safety-adapter"
# Old models of the Hub have no organisation.
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TITLE = "# LoRA adapter\n"
# Files beside the tokenizer's that name the folder they were loaded from, and under which key.
_LOADED_FROM = {"tokenizer_config.json": "name_or_path"}


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    license: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a LoRA adapter with what belongs to it and a card, in one commit, and return `org/name@commit`.

    Its tokenizer, journal and evidence go along.

    The card of a guarded or merged adapter keeps its section; any other is called a safety adapter, with what is in it
    and how it is used. A card that is on the Hub keeps everything but that section, else the folder's own is taken.
    Pickled files, checkpoints and reports stay here, and so does the evidence of `safemerge gate` where the config's
    base is a folder, since what is uploaded then has another config.

    base_model: what the base is called on the Hub, where the adapter's config names a folder of this machine.
    license: what a new card's head says, an identifier of the Hub; left out, nothing is said.
    private, revision, create_pr, commit_message, token: as `Subspace.push_to_hub` has them.
    Raises AdapterError offline and without a login before any work, for a folder without a plain LoRA in safetensors,
    for a base without a name, and where the Hub refuses.
    """
    place = as_path(folder, "adapter", error=AdapterError)
    to = Destination(repo_id, revision, private, create_pr, commit_message, token)
    check_destination(to, f"adapter {str(place)!r}", error=AdapterError)
    if not place.is_dir():
        raise AdapterError(f"adapter {str(place)!r}: no such folder. Give the one that holds {CONFIG} and {WEIGHTS}.")
    adapter = load_adapter(place, moved_base=True)
    base = _base(adapter, base_model)
    local = _text(place / CARD_FILE)
    if local is not None:
        local = _without_template(local)
    if local is not None and base is not None and adapter.base_model not in (None, base):
        # PEFT names the base in the head, and in a tag.
        local = local.replace(str(adapter.base_model), base)
    kept = section_in(local) if local is not None else None
    tags = ["lora", TAG] if kept is not None else ["lora", TAG, SAFETY_TAG]
    section = kept if kept is not None else adapter_section(adapter, base, repo_id)
    head = card_head([base], tags, "peft")

    entries = {"license": license, "base_model": base if is_hub_id(base) else None}

    def card(there: str | None) -> str:
        return completed(there or local, head=head, title=_TITLE, section=section, tags=tags, entries=entries)

    return upload(to, _files(place, adapter, base), card, f"adapter {place.resolve().name!r}", error=AdapterError)


def adapter_section(adapter: Adapter, base: str | None, repo: str) -> str:
    """Return what a card says of a safety adapter: what is in it and how it is used; names from outside are escaped."""
    leaves = Counter(name.rpartition(".")[2] for name in adapter.factors)
    ranks = sorted({factors.rank for factors in adapter.factors.values()})
    facts = {
        "base model": base,
        "modules": f"{len(adapter.factors)}: {', '.join(f'{leaf} ({count})' for leaf, count in leaves.items())}",
        "rank": " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))),
        f"sha256 of {WEIGHTS}": file_digests(adapter.folder, (WEIGHTS,)).get(WEIGHTS),
    }
    rows = [f"| {escaped(key)} | {escaped(value)} |" for key, value in facts.items() if value]
    return "\n".join(
        [
            "## Safety adapter\n",
            "What is merged into a fine-tune of the same base model where it has drifted from its alignment.\n",
            *["| | |", "|---|---|", *rows, "", "```python"],
            "from safemerge_callback import SafeMergeCallback",
            "",
            f'guard = SafeMergeCallback(subspace="ORG/SUBSPACE", safety_adapter="{repo}")',
            "trainer = SFTTrainer(..., callbacks=[guard])",
            "```\n",
            f"On files: `safemerge merge ADAPTER {repo} -s ORG/SUBSPACE -o OUT`. No licence is stated unless the "
            f"head of this card has one. {caveat()}",
        ]
    )


def _base(adapter: Adapter, name: str | None) -> str | None:
    """What the base is called on the Hub; None where nothing says which it is."""
    base = adapter.base_model if name is None else name
    if base is None:
        return None
    # What is said in so many words is a name, whatever lies here.
    path = existing(base) if name is None else None
    called = base if path is None else identity(path)[0]
    if is_hub_id(called) or (path is None and _NAME.fullmatch(called)):
        return called
    raise AdapterError(
        f"adapter {adapter.source!r} is of base model {shown(base)}, a folder of this machine: say what it is called "
        "on the Hub (base_model='org/name', --base-model)"
    )


def _files(folder: Path, adapter: Adapter, base: str | None) -> Mapping[str, Path | bytes]:
    """What is uploaded: name -> file, or its content where that named a folder of this machine."""
    files: dict[str, Path | bytes] = {WEIGHTS: folder / WEIGHTS, CONFIG: folder / CONFIG}
    if adapter.base_model != base:
        files[CONFIG] = _json({**adapter.config, "base_model_name_or_path": base})
    elif (folder / EVIDENCE_FILE).is_file():
        # It is of this very config.
        files[EVIDENCE_FILE] = folder / EVIDENCE_FILE
    for name in (*TOKENIZER, JOURNAL_FILE):
        path = folder / name
        paths = sorted(path.iterdir()) if path.is_dir() else [path] * path.is_file()
        files |= {one.relative_to(folder).as_posix(): one for one in paths if one.is_file()}
    for name, key in _LOADED_FROM.items():
        content = read_json(folder / name, name, error=AdapterError) if name in files else {}
        if isinstance(content, dict) and existing(content.get(key)) is not None:
            files[name] = _json({**content, key: base or ""})
    return files


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _without_template(card: str) -> str:
    """The card that PEFT writes without the questions of its template, where nobody has answered any."""
    from huggingface_hub import ModelCard, ModelCardData

    with suppress(ImportError):  # jinja2, which PEFT needs to write it
        return card.replace(ModelCard.from_template(ModelCardData()).text.strip(), _TITLE.strip(), 1)
    return card


def _text(path: Path) -> str | None:
    """A card that lies in the folder; None where there is none, or it is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
