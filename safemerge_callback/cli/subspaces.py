"""Verbs on subspace files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Verb, app, examples, show
from .options import Bar, Device, device_named, targets


@app.command(
    cls=Verb,
    epilog=examples(
        "build --aligned ORG/CHAT --unaligned ORG/BASE --target-modules q_proj,v_proj -o model.subspace.safetensors",
        "build --aligned ORG/CHAT --adapter ALIGNMENT_LORA -o model.subspace.safetensors",
    ),
)
def build(
    output: Annotated[Path, typer.Option("--output", "-o", help="Subspace file to write (safetensors).")],
    aligned: Annotated[
        str | None, typer.Option(help="Aligned checkpoint (chat): folder, file or Hub id, org/name[@revision].")
    ] = None,
    unaligned: Annotated[str | None, typer.Option(help="Unaligned checkpoint (base) of the same model.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Instead of --unaligned: the LoRA adapter that aligned the model.")
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Names or endings, with commas between, or one regular expression; as PEFT.")
    ] = None,
    common_rows: Annotated[
        bool, typer.Option("--common-rows", help="Let vocabularies differ in size: take the rows that both have.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...; left out: a GPU, if there is one.")
    ] = None,
    progress: Bar = True,
) -> None:
    """Write a model's safety subspace: aligned minus unaligned, module by module; a killed build is gone on with."""
    from ..subspace import build_subspace

    subspace = build_subspace(
        output,
        aligned=aligned,
        unaligned=unaligned,
        alignment_adapter=adapter,
        target_modules=targets(target_modules),
        common_rows=common_rows,
        device=None if device is None else device_named(device),
        progress=progress,
    )
    text = f"{output}: alignment matrices of {len(subspace.modules)} modules"
    show(text, {"output": output, "modules": list(subspace.modules)})


@app.command(cls=Verb, epilog=examples("describe model.subspace.safetensors --verify"))
def describe(
    subspace: Annotated[str, typer.Argument(metavar="SUBSPACE", help="Subspace: file or Hub id, org/name[@revision].")],
    verify: Annotated[bool, typer.Option("--verify", help="Also compare every tensor with its checksum.")] = False,
) -> None:
    """Tell where a subspace file came from and what it holds."""
    from ..subspace import Subspace

    stored = Subspace.from_pretrained(subspace)
    lines, document = [stored.describe()], dict(stored.to_dict())
    if verify:
        document["verified"] = stored.verify()
        lines.append(f"checksums: all {document['verified']} tensors are as they were written")
    show("\n".join(lines), document)


@app.command(cls=Verb, epilog=examples("compress model.subspace.safetensors -o model.int8.safetensors"))
def compress(
    subspace: Annotated[
        Path, typer.Argument(metavar="SUBSPACE", help="Exact subspace file, which stays needed beside the output.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Compressed file to write, in the same folder.")],
    kind: Annotated[str, typer.Option(help="int8: a byte a value; truncated: two factors.")] = "int8",
    rank: Annotated[int | None, typer.Option(help="Of kind truncated. [default: 64]")] = None,
    device: Device = "cpu",
    progress: Bar = True,
) -> None:
    """Write a smaller companion of a subspace file, with proven bounds, so that decisions stay exact."""
    from ..subspace import Subspace, compress_subspace

    exact = Subspace.load(subspace)
    small = compress_subspace(exact, output, kind, rank, device=device_named(device), progress=progress)
    before, after = (sum(m.bytes(n) for n, m in s.modules.items()) for s in (exact, small))
    text = f"{output}: {len(small.modules)} modules, {after / before:.1%} of the bytes; keep {subspace} beside it"
    sizes = {"bytes": after, "exact_bytes": before}
    show(text, {"output": output, "exact": subspace, "kind": kind, "modules": list(small.modules), **sizes})
