"""Figures of matplotlib, which is imported when one is drawn: as .png, .pdf or .svg, whole or not at all."""

from __future__ import annotations

import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import ConfigError

FORMATS = (".png", ".pdf", ".svg")


def figure_module() -> Any:
    """Return `matplotlib.figure`; ConfigError that names the extra where matplotlib is not installed."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install 'safemerge-callback[report]'") from error
    return matplotlib.figure


def save_figure(figure: Any, output: str | Path) -> Path:
    """Write a figure as .png, .pdf or .svg; return the path. A file of that name is replaced.

    Raises ConfigError for another ending, or a folder that cannot be written.
    """
    path = checked_name(output)
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, dpi=160, facecolor="white")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"report {str(output)!r} cannot be written: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return path


def checked_name(output: str | Path) -> Path:
    """Return `output` as a path; ConfigError where its ending is none that a figure can be written as."""
    path = Path(output).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"report {str(output)!r}: the name must end in one of {', '.join(FORMATS)}.")
    return path
