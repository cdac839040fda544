"""Two sides' evidence, name by name: equal, equal but for keys that only the new side has, or not.

Only the lines of a journal may have new keys: whoever reads one passes over what it does not know.
"""

from typing import NamedTuple

_SHOWN = 3


class Row(NamedTuple):
    """One piece of evidence: its name, `equal`, `added` or `DIFFERS`, and where."""

    name: str
    status: str
    where: str = ""


def compared(old, new):
    """A row for every piece of evidence of either side."""
    return [_row(name, old, new) for name in sorted(old.keys() | new.keys())]


def _row(name, old, new):
    if name not in old or name not in new:
        return Row(name, "DIFFERS", f"only {'before' if name in old else 'after'}")
    changed, added = differences(old[name], new[name])
    changed += [f"{place} is new" for place in added if "journal" not in name + place]
    if changed:
        return Row(name, "DIFFERS", _listed(changed))
    return Row(name, "added" if added else "equal", _listed(sorted(set(added))))


def differences(old, new, at=""):
    """Where two values of JSON differ, as (changed or taken away, added): added are keys that only `new` has.

    Places in lists are left out of what was added, so that a key of every module is told once.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        changed = [f"{at}.{key} is gone" for key in old if key not in new]
        added = [_without_places(f"{at}.{key}") for key in new if key not in old]
        pairs = [(old[key], new[key], f"{at}.{key}") for key in old if key in new]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        changed, added = [], []
        pairs = [(x, y, f"{at}[{i}]") for i, (x, y) in enumerate(zip(old, new, strict=True))]
    else:
        same = type(old) is type(new) and old == new
        return ([] if same else [f"{at or 'it'}: {_short(old)} -> {_short(new)}"]), []
    for x, y, place in pairs:
        more, beside = differences(x, y, place)
        changed, added = changed + more, added + beside
    return changed, added


def _without_places(path):
    return "[]".join(part.rpartition("[")[0] if "[" in part else part for part in path.split("]"))


def _short(value):
    text = f"{len(value)} lines" if isinstance(value, list) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(places):
    more = len(places) - _SHOWN
    return "; ".join([*places[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def table(rows, *, all_names=False):
    """The rows as text: each that differs or has more, a line for every run, and the count of all."""
    told = [row for row in rows if all_names or row.status != "equal"]
    wide = max((len(row.name) for row in told), default=0)
    lines = [f"{row.name:{wide}}  {row.status:7}  {row.where}".rstrip() for row in told]
    counts = {status: sum(row.status == status for row in rows) for status in ("equal", "added", "DIFFERS")}
    total = ", ".join(f"{count} {status}" for status, count in counts.items())
    return "\n".join([*lines, f"{len(rows)} pieces of evidence of {_runs(rows)} runs: {total}"])


def _runs(rows):
    return len({row.name.rpartition("/")[0] for row in rows})
