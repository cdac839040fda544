"""What a terminal is shown of a text from outside: its letters, and written out whatever it would obey instead."""

from __future__ import annotations

import unicodedata


def printable(text: str, *, lines: bool = False) -> str:
    """Return `text` with all that moves a cursor, colours, turns the order of letters or cannot be encoded written out.

    A line feed is written out too, so that no name begins a line of its own, but with `lines` (a text of ours).
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if _is_shown(letter) or (lines and letter == "\n") else _written(letter) for letter in text)


def _is_shown(letter: str) -> bool:
    # Blanks besides the common one are no "printable" letters to Python, and do no harm.
    return letter.isprintable() or unicodedata.category(letter) == "Zs"


def _written(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
