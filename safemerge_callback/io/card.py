"""What every model card of ours has in common."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .paths import existing
from .whole_file import whole_file

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HEAD = re.compile(r"---\r?\n(?P<head>.*?\n)---[ \t]*\r?(\n|$)", flags=re.S)
# Between these two lines a card is ours.
BEGIN, END = "<!-- safemerge: begin -->", "<!-- safemerge: end -->"
TAG = "safemerge"

_MARKS = re.compile(f"{re.escape(BEGIN)}|{re.escape(END)}")

_CAVEAT = "answers accidental loss of safety in fine-tuning; it does not withstand an attack: evaluate before use."


def caveat(what: str = "The merge") -> str:
    """Return the sentence that every card ends with: what `what` is for, and what it is not."""
    return f"{what} {_CAVEAT}"


def front_matter(base_model: str | None, baked: bool = False, tag: str | None = TAG) -> str:
    """Return the head of an adapter's card, or of a model's that one was `baked` into; a base that is a Hub id."""
    library, tags = ("transformers", ()) if baked else ("peft", ("lora",))
    return card_head([base_model], [*tags, *filter(None, [tag])], library)


def card_head(bases: Iterable[str | None], tags: Iterable[str], library: str | None = None) -> str:
    """Return the head of a card; of `bases` those that are Hub ids, since the Hub refuses a local path."""
    # A JSON string is a YAML string.
    known = [json.dumps(base) for base in bases if is_hub_id(base)]
    one = f"base_model: {known[0]}\n" if len(known) == 1 else ""
    many = "base_model:\n" + "".join(f"- {base}\n" for base in known) if len(known) > 1 else ""
    named = f"library_name: {library}\n" if library else ""
    listed = "".join(f"- {tag}\n" for tag in tags)
    return f"---\n{one}{many}{named}tags:\n{listed}---\n"


def is_hub_id(name: Any) -> bool:
    """Whether `name` is the id of a repository, `org/name`, and no path of this machine."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None and existing(name) is None


def escaped(text: str) -> str:
    """Return `text` as one line of Markdown that renders as itself, inside a table too."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_\[\](){}<>|~#&!$])", r"\\\1", one_line)


def is_card(path: Path) -> bool:
    """Whether the file at `path` begins as a model card does. Raises OSError, and ValueError for what is no text."""
    return has_head(path.read_bytes().decode("utf-8"))


def has_head(text: str) -> bool:
    """Whether `text` begins as a model card does."""
    return _HEAD.match(text) is not None


def edit_card(path: Path, section: str, tag: str | None = None) -> None:
    """Put `section` (and `tag` into the head's `tags`) into the model card at `path`; nothing else in it changes.

    The section stands between two comments, and an earlier one is replaced. A card whose comments are not one pair is
    left as it is, and so is a head that is not understood. Raises OSError, and ValueError for a file that is no text.
    """
    old = path.read_bytes().decode("utf-8")
    new = with_section(old, section)
    new = new if tag is None else with_tag(new, tag)
    if new != old:
        with whole_file(path) as part:
            part.write_bytes(new.encode("utf-8"))


def with_section(card: str, section: str) -> str:
    """Return `card` with `section` between our comments: in the place of what is between them, or at the end."""
    block, marks = f"{BEGIN}\n{section.strip()}\n{END}", (card.count(BEGIN), card.count(END))
    if marks == (0, 0):
        return f"{card.rstrip()}\n\n{block}\n".lstrip()
    before, _, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{block}{after}" if marks == (1, 1) and end else card


def section_in(card: str) -> str | None:
    """Return what stands between our comments; None where they are not one pair."""
    before, begin, rest = card.partition(BEGIN)
    section, end, after = rest.partition(END)
    return section.strip() if begin and end and not {BEGIN, END} & {*re.findall(_MARKS, before + after)} else None


def completed(
    card: str | None, *, head: str, title: str, section: str, tags: Iterable[str], entries: Mapping[str, str | None]
) -> str:
    """Return `card` with our section, tags and `entries` of the head in it, and nothing else changed; or a new one.

    `head` is that of a new card, or of a text that has none; `title` follows it in a new one.
    """
    if card is None or not card.strip():
        card = f"{head}\n{title}"
    elif not has_head(card):
        card = f"{head}\n{card}"
    for tag in tags:
        card = with_tag(card, tag)
    for key, value in entries.items():
        card = card if value is None else with_entry(card, key, value)
    return with_section(card, section)


def with_entry(card: str, key: str, value: str) -> str:
    """Return `card` with this text in its head; as it is where it has no head, one not understood, or a list there."""
    match = _HEAD.match(card)
    old = _mapping(match["head"]) if match else None
    if match is None or old is None:
        return card
    head, line = match["head"], f"{key}: {json.dumps(value)}\n"
    new = re.sub(rf"^{key}:.*\n", lambda _: line, head, flags=re.M) if key in old else f"{head}{line}"
    whole = _mapping(new) == {**old, key: value}
    return f"{card[: match.start('head')]}{new}{card[match.end('head') :]}" if whole else card


def with_tag(card: str, tag: str) -> str:
    """Return `card` with `tag` among the `tags` of its head; as it is where it has no head, or one not understood."""
    match = _HEAD.match(card)
    old = _mapping(match["head"]) if match else None
    if match is None or old is None:
        return card
    head, tags, line = match["head"], old.get("tags", []), f"- {tag}\n"
    if not isinstance(tags, list) or tag in tags:
        return card
    listed = re.search(r"^tags:[ \t]*\r?\n(?P<indent>[ \t]*)(?=- )", head, flags=re.M)
    at = listed.end() if listed else len(head)
    new = f"{head[:at]}{line}{listed['indent']}{head[at:]}" if listed else f"{head}tags:\n{line}"
    # Whatever the head's author meant by it stays, or the head stays.
    whole = _mapping(new) == {**old, "tags": [tag, *tags]}
    return f"{card[: match.start('head')]}{new}{card[match.end('head') :]}" if whole else card


def _mapping(text: str) -> dict[str, Any] | None:
    import yaml

    try:
        mapping = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return mapping if isinstance(mapping, dict) else None
