"""What was asked, by digest: two evaluations of equal digests asked the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any


def texts_digest(texts: Sequence[str]) -> str:
    """Return the SHA-256 of texts in their order, 64 hexadecimal digits: over their JSON list in ASCII, no blanks."""
    return hashlib.sha256(json.dumps(list(texts), separators=(",", ":")).encode("ascii")).hexdigest()


def template_digest(tokenizer: Any) -> str:
    """Return the digest of a tokenizer's chat template, or templates by name; empty where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return ""
    texts = [template] if isinstance(template, str) else [text for pair in sorted(template.items()) for text in pair]
    return texts_digest(texts)
