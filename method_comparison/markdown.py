"""Figures as the page shows them, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .statistics import Interval


def percent(interval: Interval | None) -> str:
    """Return a share in percent with its interval; nothing for None."""
    return (
        "" if interval is None else f"{100 * interval.value:.1f} ({100 * interval.low:.0f}-{100 * interval.high:.0f})"
    )


def points(interval: Interval | None) -> str:
    """Return a difference of shares in percentage points with its interval; nothing for None."""
    if interval is None:
        return ""
    return f"{100 * interval.value:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; a cell's own bars are escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
