"""Figures of matplotlib, which is imported when one is drawn: as .png, .pdf or .svg, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..io.outputs import PICTURE, new_output
from ..io.paths import as_path

FORMATS = (".png", ".pdf", ".svg")


def figure_module() -> Any:
    """Return `matplotlib.figure`; ConfigError that names the extra where matplotlib is not installed."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install 'safemerge-callback[report]'") from error
    return matplotlib.figure


def save_figure(figure: Any, output: str | Path) -> Path:
    """Write a figure as .png, .pdf or .svg; return the path. A picture of that name is replaced.

    Raises ConfigError for another ending, for what is there and is no picture, or a folder that cannot be written.
    """
    path = checked_name(output)
    with new_output(path, "report", PICTURE) as part:
        figure.savefig(part, dpi=160, facecolor="white", format=path.suffix[1:].lower())
    return path


def checked_name(output: str | Path) -> Path:
    """Return `output` as a path; ConfigError where its ending is none that a figure can be written as."""
    path = as_path(output, "report")
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"report {str(output)!r}: the name must end in one of {', '.join(FORMATS)}.")
    return path
