"""A subspace as text and as plain data; apart from the file: it is for readers, and the header is all that it needs."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

from ..io.printable import printable
from .header import VERSION, FileHeader, ModuleHeader

_WIDTH = 200
_ENERGY_AT = ("1", "4", "16", "64")


def render(title: str, header: FileHeader) -> str:
    """Return the sources of V, a table with one line a module, and totals."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(f"{title}: {len(header.modules)} modules"), style="italic"))
    columns = ["shape", "kind", "rank", "dtype", "‖V‖", "null cosine", "energy at rank 1 / 4 / 16 / 64"]
    bounded = any(module.error for module in header.modules.values())
    table.add_column("module", no_wrap=True)
    for column in [*columns, *(["error"] if bounded else []), "bytes"]:
        table.add_column(column, justify="right", no_wrap=True)
    for name, module in header.modules.items():
        cells = [
            *_cells(module),
            *([f"{module.error / module.norm:.1e}"] if bounded else []),
            _size(module.bytes(name)),
        ]
        table.add_row(*(Text(printable(cell)) for cell in (name, *cells)))
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
    for line in _lines(header):
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    console.print(_totals(header, bounded), markup=False, highlight=False, soft_wrap=True)
    return console.file.getvalue()  # type: ignore[attr-defined]


def as_dict(header: FileHeader) -> dict[str, Any]:
    """Return the same as plain data: the header, with the bytes of each module and of all."""
    plain = asdict(header)
    for name, module in header.modules.items():
        plain["modules"][name]["bytes"] = module.bytes(name)
    return {"version": VERSION, "bytes": _bytes(header), **plain}


def _lines(header: FileHeader) -> list[str]:
    lines = [f"aligned:   {_one_line(header.aligned)}", f"unaligned: {_one_line(header.unaligned)}"]
    if header.exact:
        lines.append(f"exact:     {header.exact['file']}, which this file was made from and needs beside it")
    if header.unmoved:
        lines.append(f"equal at {len(header.unmoved)} modules (not stored), first {header.unmoved[0]}")
    return lines


def _cells(module: ModuleHeader) -> list[str]:
    spread = sorted(module.null_std.values())
    null = f"{module.null_cosine:.3f}" + (f" ± {spread[0]:.3f} to {spread[-1]:.3f}" if spread else "")
    energy = " / ".join(f"{100 * module.energy[k]:.0f} %" if k in module.energy else "-" for k in _ENERGY_AT)
    rank = "" if module.rank is None else str(module.rank)
    return [
        f"{module.shape[0]} x {module.shape[1]}",
        module.kind,
        rank,
        module.dtype,
        f"{module.norm:.4g}",
        null,
        energy,
    ]


def _bytes(header: FileHeader) -> int:
    return sum(module.bytes(name) for name, module in header.modules.items())


def _totals(header: FileHeader, bounded: bool) -> str:
    kinds = [module.kind for module in header.modules.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    text = f"total: {_size(_bytes(header))} in {len(kinds)} modules ({counts})"
    return text + ("; error is a bound on ‖V - stored‖₂ / ‖V‖" if bounded else "")


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _one_line(fingerprint: dict[str, object]) -> str:
    if "alignment_adapter" in fingerprint:
        return f"adapter {fingerprint['alignment_adapter']} on {fingerprint['base_model'] or 'an unnamed model'}"
    revision = fingerprint.get("revision")
    return f"{fingerprint.get('source', 'not given')}{f' at {revision}' if revision else ''}"
