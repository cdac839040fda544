"""A text from outside, of which a program may have left half of a letter."""

from __future__ import annotations

from ..errors import ConfigError, shown


def check_whole(text: str, who: str) -> str:
    """Return the text; ConfigError, which begins with `who`, for half of a surrogate pair.

    JSON, YAML and Python can hold one, and no file, terminal or tokenizer takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{who} holds half of a letter, {shown(text[error.start])} at place {error.start + 1} of {len(text)}: a "
            "text was cut within a pair of surrogates. Write the whole letter, or leave it out"
        ) from error
    return text
