"""What every model card of ours has in common."""

from __future__ import annotations

import json
import re

from ..paths import existing

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

CAVEAT = (
    "The merge answers accidental loss of safety in fine-tuning; it does not withstand an attack: evaluate before use."
)


def front_matter(base_model: str | None, baked: bool = False) -> str:
    """Return the head of an adapter's card, or of a model's that one was `baked` into; a base that is a Hub id."""
    # A JSON string is a YAML string. A local path is no model id, which the Hub would refuse.
    known = base_model is not None and _HUB_ID.fullmatch(base_model) and existing(base_model) is None
    base = f"base_model: {json.dumps(base_model)}\n" if known else ""
    library, tags = ("transformers", "") if baked else ("peft", "- lora\n")
    return f"---\n{base}library_name: {library}\ntags:\n{tags}- safemerge\n---\n"


def escaped(text: str) -> str:
    """Return `text` as one line of Markdown that renders as itself, inside a table too."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_\[\](){}<>|~#&!$])", r"\\\1", one_line)
