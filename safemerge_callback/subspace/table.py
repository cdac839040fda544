"""A subspace as text."""

from __future__ import annotations

import io

from .header import FileHeader

_WIDTH = 120


def render(title: str, header: FileHeader) -> str:
    """Return the sources of V and a table with one line a module."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}: {len(header.modules)} modules")
    table.add_column("module", no_wrap=True)
    for column in ("shape", "kind", "rank", "dtype", "‖V‖", "null cosine"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, module in header.modules.items():
        rank = "" if module.rank is None else str(module.rank)
        shape = f"{module.shape[0]} x {module.shape[1]}"
        table.add_row(name, shape, module.kind, rank, module.dtype, f"{module.norm:.4g}", f"{module.null_cosine:.3f}")
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
    console.print(f"aligned:   {_one_line(header.aligned)}", markup=False, highlight=False)
    console.print(f"unaligned: {_one_line(header.unaligned)}", markup=False, highlight=False)
    if header.unmoved:
        console.print(f"equal at {len(header.unmoved)} modules (not stored), first {header.unmoved[0]}", markup=False)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def _one_line(fingerprint: dict[str, object]) -> str:
    if "alignment_adapter" in fingerprint:
        return f"adapter {fingerprint['alignment_adapter']} on {fingerprint['base_model'] or 'an unnamed model'}"
    revision = fingerprint.get("revision")
    return f"{fingerprint.get('source', 'not given')}{f' at {revision}' if revision else ''}"
