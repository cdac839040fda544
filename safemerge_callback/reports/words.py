"""How many there are, in words; the table, the watch, the pictures and the page all say it so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sized

from ..record.history import MERGE, History

# A dash as typesetters have it, for no value.
NOTHING = "\N{EN DASH}"


def counted(things: Sized, noun: str) -> str:
    """Return `1 merge`, `2 merges`."""
    return several(len(things), noun)


def several(count: int, noun: str) -> str:
    """Return `1 merge`, `2 merges`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def seconds_text(seconds: float) -> str:
    """Return a duration as `850 ms`, `1.2 s` or `16.0 min`."""
    if seconds >= 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def correction_words(history: History) -> dict[str, str]:
    """Return correction -> how often it changed a module, the merge first, each counted apart.

    As `3 merges in 2 modules, 1 taken back`, and `4 changes by average in 4 modules`.
    """
    return {name: _words(name, changes) for name, changes in history.by_correction.items()}


def _words(correction: str, changes: dict[tuple[str, int], bool]) -> str:
    noun = "merge" if correction == MERGE else "change"
    who = "" if correction == MERGE else f" by {correction}"
    back = sum(changes.values())
    modules = {name for name, _ in changes}
    return f"{counted(changes, noun)}{who} in {counted(modules, 'module')}{f', {back} taken back' if back else ''}"


def change_counts(history: History) -> dict[str, Counter[str]]:
    """Return how often each module was changed, under the heading of a column: `merges`, then each other correction."""
    heads = {name: "merges" if name == MERGE else name for name in history.by_correction}
    return {heads[name]: Counter(module for module, _ in keys) for name, keys in history.by_correction.items()}


def mark_words(history: History) -> str:
    """Return what a mark on a module's check means: `merged`, or what else was done to it in this run."""
    names = [name for name, changes in history.by_correction.items() if changes]
    return ", or ".join(map(_done, names))


def changed_words(history: History, module: str, step: int) -> str:
    """Return what was done to a module at a step, as `merged`, or `changed by average and merged`."""
    return " and ".join(map(_done, history.corrections_at(module, step)))


def _done(correction: str) -> str:
    return "merged" if correction == MERGE else f"changed by {correction}"
