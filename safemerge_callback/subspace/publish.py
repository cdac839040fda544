"""A subspace file on the Hub: its card, and the upload. Apart from the file: a header and a path are all it needs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import SubspaceError
from ..io.card import TAG, card_head, completed, escaped, is_hub_id
from ..io.hub_upload import Destination, check_destination, upload
from .file_address import hub_name
from .header import VERSION, FileHeader

TAGS = (TAG, "safety-subspace", "lora")
_WORDS = re.compile(r"[\w,-]+")
_TITLE = "# Safety subspace\n"


def push_file(
    path: Path,
    header: FileHeader,
    fingerprint: str,
    to: Destination,
    verify: Callable[[], Any],
    license: str | None = None,
) -> str:
    """Upload a subspace file with its card in one commit, and return `org/name@commit/FILE`, which opens it there.

    `fingerprint` is the sha256 of its header; `verify` is called before anything is sent and raises what ends the push.
    Raises SubspaceError as `upload`.
    """
    name = hub_name(path)
    check_destination(to, f"subspace {str(path)!r}", error=SubspaceError)
    verify()
    section = subspace_section(name, path.stat().st_size, header, fingerprint, to.repo)
    head = card_head(_bases(header), TAGS)
    card = partial(completed, head=head, title=_TITLE, section=section, tags=TAGS, entries={"license": license})
    return f"{upload(to, {name: path}, card, f'subspace {name!r}', error=SubspaceError)}/{name}"


def subspace_section(name: str, size: int, header: FileHeader, fingerprint: str, repo: str) -> str:
    """Return what a card says of the file `name` of `size` bytes in `repo`; names from outside are escaped."""
    facts = {
        "file": f"{name}, {size / 1e6:,.1f} MB, format version {VERSION}",
        "aligned": _origin(header.aligned),
        "unaligned": _origin(header.unaligned),
        "modules": _counts(header),
        "stored as": ", ".join(f"{kind} ({count})" for kind, count in _kinds(header).items()),
        "made from": f"{header.exact['file']}, which decisions at the gate's edge need beside it"
        if header.exact
        else None,
        "sha256 of the header": fingerprint,
    }
    rows = [f"| {key} | {escaped(value)} |" for key, value in facts.items() if value]
    return "\n".join(
        [
            "## Safety subspace\n",
            "What alignment did to this model's weights, module by module: `V = W_aligned - W_unaligned`. A LoRA "
            "fine-tune of the aligned model is measured along it, and what has drifted is drawn back.\n",
            *["| | |", "|---|---|", *rows, ""],
            *_use(name, repo),
            *_command(name, header),
            "It fits LoRA on the aligned model named above and on no other, which is checked before the first step. V "
            "is made of both checkpoints' weights: their licences hold for it, and this card states none of its own "
            "unless its head does.",
        ]
    )


def _bases(header: FileHeader) -> list[str | None]:
    """The checkpoints, where they are known by name."""
    sides = (header.aligned.get("source"), header.unaligned.get("source") or header.unaligned.get("base_model"))
    return list(dict.fromkeys(str(side) for side in sides if side))


def _origin(side: Mapping[str, Any]) -> str | None:
    """Where one side of V came from: a checkpoint, or the adapter that aligned the model."""
    if "alignment_adapter" in side:
        base = f" on {side['base_model']}" if side.get("base_model") else ""
        words = f"the model without the LoRA adapter {side['alignment_adapter']}{base}"
    elif side.get("source"):
        words = f"{side['source']}{f' at {revision}' if (revision := side.get('revision')) else ''}"
    else:
        return None
    return f"{words}; sha256 of the weights {digest}" if (digest := side.get("weights_sha256")) else words


def _counts(header: FileHeader) -> str:
    leaves = Counter(name.rpartition(".")[2] for name in header.modules)
    words = f"{len(header.modules)}: {', '.join(f'{leaf} ({count})' for leaf, count in leaves.items())}"
    return words + (f"; equal in both, and not stored: {len(header.unmoved)}" if header.unmoved else "")


def _kinds(header: FileHeader) -> Counter[str]:
    return Counter(f"{module.kind} {module.dtype}" for module in header.modules.values())


def _use(name: str, repo: str) -> list[str]:
    return [
        "```python",
        "from safemerge_callback import SafeMergeCallback",
        "",
        f'trainer = SFTTrainer(..., callbacks=[SafeMergeCallback(subspace="{repo}")])',
        "```\n",
        f"On files: `safemerge measure ADAPTER -s {repo}`. Of several files `{repo}@main/{name}` is this one.\n",
    ]


def _command(name: str, header: FileHeader) -> list[str]:
    """How it can be built again, where both checkpoints are on the Hub."""
    sides = (header.aligned, header.unaligned)
    leaves = ",".join(dict.fromkeys(name.rpartition(".")[2] for name in header.modules))
    if header.exact or not all(is_hub_id(side.get("source")) for side in sides) or not _WORDS.fullmatch(leaves):
        return []
    aligned, unaligned = (f"{side['source']}@{side.get('revision') or 'main'}" for side in sides)
    sources = f"--aligned {aligned} --unaligned {unaligned}"
    return ["Built by, or as by:\n", "```", f"safemerge build {sources} --target-modules {leaves} -o {name}", "```\n"]
