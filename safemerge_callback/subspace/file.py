"""The subspace file, opened: its header at once, its tensors when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapters import LoraFactors
from ..errors import SubspaceError, nearest
from ..io.file_faults import reading_fault
from ..io.hub_upload import Destination
from ..io.paths import as_path
from ..ops import AlignmentMatrix, full_precision, turned
from .check import check_base, check_modules, require_tensors
from .digests import digest_of
from .file_address import FileAddress, find_file, plain_name
from .header import PROBE_POSITIONS, PROBES, VERSION, FileHeader, ModuleHeader
from .publish import push_file
from .read_ahead import spans_of, will_need
from .spectrum import spread_at, turned_spread
from .stack import FromFile, Placement, Request, assemble
from .table import as_dict, render


class Subspace:
    """The alignment matrices V of a model, by canonical module name; open it with `Subspace.from_pretrained`."""

    def __init__(self, path: Path, header: FileHeader, fingerprint: str, address: str | None = None) -> None:
        self.path = path
        self.address = address
        self.header = header
        self.fingerprint = fingerprint
        self._exact: Subspace | None = None
        self._placement: Placement = FromFile()

    @classmethod
    def load(cls, path: str | Path) -> Subspace:
        """Open a subspace file of this machine; only its header is read.

        Raises SubspaceError for a file that is absent, corrupt, cut short, of another version, or something else.
        """
        path = as_path(path, "subspace", error=SubspaceError)
        if not path.is_file():
            raise SubspaceError(
                f"subspace {str(path)!r}: no such file. Write one with build_subspace, or `safemerge build`."
            )
        return cls._open(FileAddress(path))

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> Subspace:
        """Open the subspace of a file, a folder or a repository of the Hub, `org/name[@revision[/FILE.safetensors]]`.

        A path that is there wins. From the Hub the one file is fetched into the Hub's cache, at the commit that
        `revision` (default: main) is now; `address` then names that commit. Only its header is read. Raises
        SubspaceError as `load`, and where the Hub does not give it: an unknown, private or gated repository, an unknown
        revision, no subspace file or several, or no connection and nothing in the cache.
        """
        return cls._open(find_file(source, revision))

    @classmethod
    @full_precision()
    def _open(cls, file_address: FileAddress) -> Subspace:
        path, address = file_address
        where = f"subspace {address or str(path)!r}"
        try:
            with safe_open(path, framework="pt") as file:
                header = FileHeader.from_metadata(file.metadata(), where)
                fingerprint = (file.metadata() or {}).get("sha256", "")
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                stored = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
        except (SafetensorError, OSError) as error:
            damage = "is corrupt, cut short, or no safetensors file"
            raise SubspaceError(f"{where} {reading_fault(path, error, 'Build it again.', damage)}") from error
        require_tensors(header, stored, where)
        return cls(path, header, fingerprint, address)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        license: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the file with a card to `repo_id`, in one commit; return the address that opens it there again.

        The repository is made where it is not there (`private`: for you alone). Every checksum is compared before
        anything is sent. The card says what V was made of, and how to use it; a card that is there keeps everything
        but that section. `license`: what the card's head says, an identifier of the Hub; left out, nothing is said.
        `revision`: a branch, made where it is not there. Raises SubspaceError offline and without a login before any
        work, for an id that cannot be, for a file that was changed, and where the Hub refuses.
        """
        to = Destination(repo_id, revision, private, create_pr, commit_message, token)
        return push_file(self.path, self.header, self.fingerprint, to, self.verify, license)

    @property
    def source(self) -> str:
        """What opens this very file again: its address on the Hub, or else its path."""
        return self.address or str(self.path)

    @property
    def name(self) -> str:
        """What may be said of it elsewhere, without a path of this machine: the address, or the file's name."""
        return self.address or self.path.name

    @property
    def version(self) -> str:
        """The file's format version."""
        return VERSION

    @property
    def aligned(self) -> dict[str, Any]:
        """Fingerprint of the aligned checkpoint; empty where V came from an adapter alone."""
        return dict(self.header.aligned)

    @property
    def unaligned(self) -> dict[str, Any]:
        """Fingerprint of the unaligned checkpoint, or of the alignment adapter that V came from."""
        return dict(self.header.unaligned)

    @property
    def compressed(self) -> bool:
        """Whether this file was made from an exact one: `exact` opens that."""
        return bool(self.header.exact)

    @property
    def modules(self) -> Mapping[str, ModuleHeader]:
        """Canonical name -> header of every module that has an alignment matrix."""
        return MappingProxyType(self.header.modules)

    @property
    def unmoved(self) -> tuple[str, ...]:
        """Modules at which aligned and unaligned are equal: V = 0, so they are neither stored nor measured."""
        return tuple(self.header.unmoved)

    def null_cosine(self, name: str, transposed: bool = False) -> float:
        """Return the null cosine, that of an update unrelated to V, for the stored orientation or the transposed one.

        ‖V·Vᵀ‖ = ‖Vᵀ·V‖, so only √d_out in ‖V‖² / (√d_out·‖V·Vᵀ‖) changes: rows become columns.
        """
        module = self._module(name)
        rows, columns = module.shape
        return min(1.0, module.null_cosine * (rows / columns) ** 0.5) if transposed else module.null_cosine

    def null_std(self, name: str, rank: int, transposed: bool = False) -> float | None:
        """Return the standard deviation of the cosine of an unrelated update of `rank`, as `null_cosine` its mean.

        None where the file has none. `spread_at` has the formula between the ranks that were drawn.
        """
        module = self._module(name)
        if not module.null_std:
            return None
        spread = spread_at(rank, module.null_std)
        if not transposed:
            return spread
        return turned_spread(spread, module.null_cosine, self.null_cosine(name, transposed=True), rank, module.shape)

    def stack(
        self, names: Sequence[str], *, device: torch.device | str = "cpu", transposed: bool = False
    ) -> AlignmentMatrix:
        """Return V of modules of one shape and kind, (n, d_out, d_in), or factors (n, d_out, k) and (n, k, d_in).

        Of a compressed file what is stored: near V, not V. The stored dtype, or the widest where it differs between
        modules; factors of lower rank are filled up with zeros. `transposed` turns V from the checkpoint's orientation
        into the map's (embeddings, Conv1D). One dense module is not copied but mapped from the file: do not write to
        it. Raises SubspaceError for unknown modules and for those of different shape or kind.
        """
        request = Request(tuple(names), torch.device(device), transposed)
        return next(iter(self.stacks([request])))

    def stacks(self, requests: Iterable[Request]) -> Iterator[AlignmentMatrix]:
        """Yield the stack of each request in turn, so that the next may be fetched while one is used."""
        announced = self._announced(requests) if isinstance(self._placement, FromFile) else requests
        return self._placement.stacks(self._read_stack, announced)

    def place(self, placement: Placement) -> None:
        """Let `placement` hold what `stack` and `stacks` return from now on."""
        self._placement = placement

    @full_precision()
    def check(self, factors: Mapping[str, LoraFactors], weights: Mapping[str, Tensor] | None = None) -> None:
        """Raise SubspaceError unless this subspace fits these LoRA modules.

        Refused: modules that are lacking (unmoved ones are not: they are simply not measured, unless all are), shapes
        that differ, and, where live base `weights` are given and probes were recorded, a base model that is not
        `aligned`. A base loaded in bfloat16 or float16 passes.
        """
        check_modules(self.header, factors, f"subspace {self.source!r}")
        if weights and self.header.probed:
            positions, expected = self.tensors([PROBE_POSITIONS, PROBES])
            check_base(self.header, weights, positions, expected, f"subspace {self.source!r}")

    def exact(self) -> Subspace:
        """Return the exact subspace: this one, or the one beside it that a compressed file was made from.

        Of one from the Hub it is fetched from the same commit. Raises SubspaceError where that is absent or another
        one.
        """
        if not self.compressed:
            return self
        if self._exact is None:
            exact = Subspace._open(self._exact_address())
            if exact.fingerprint != self.header.exact["sha256"]:
                raise SubspaceError(
                    f"{exact.source!r} is not the file that {self.source!r} was made from: its header's sha256 is "
                    f"{exact.fingerprint}, not {self.header.exact['sha256']}. Compress it again."
                )
            self._exact = exact
        return self._exact

    def _exact_address(self) -> FileAddress:
        """Where the file is that a compressed one was made from."""
        name = plain_name(self.header.exact["file"], f"the header of {self.source!r}")
        path = self.path.parent / name
        if self.address is not None:
            return find_file(f"{self.address.rpartition('/')[0]}/{name}")
        if not path.is_file():
            raise SubspaceError(
                f"subspace {self.source!r} is compressed and leaves a decision open, and the exact file it was "
                f"made from is not beside it: looked for {str(path)!r}. Put it there, or use it in its place."
            )
        return FileAddress(path)

    def verify(self) -> int:
        """Read the whole file and compare every tensor with its checksum; return how many were compared.

        SubspaceError names those that differ.
        The header has a checksum of its own, which `load` compares.
        """
        noted = dict(self.header.checksums)
        for module in self.modules.values():
            noted.update(module.checksums)
        others = [key for key, digest in noted.items() if digest_of(*self.tensors([key])) != digest]
        if others:
            raise SubspaceError(
                f"subspace {self.source!r} was changed: {len(others)} of {len(noted)} tensors are not what was "
                f"written, first {others[0]!r}. Copy it anew, or build it again."
            )
        return len(noted)

    def describe(self) -> str:
        """Return where V came from and one line a module, as a table."""
        return render(self.name, self.header)

    def to_dict(self) -> dict[str, Any]:
        """Return what `describe` prints, JSON-able."""
        return as_dict(self.header)

    def __repr__(self) -> str:
        return f"Subspace({self.source!r}, {len(self.modules)} modules)"

    def _module(self, name: str) -> ModuleHeader:
        if name in self.modules:
            return self.modules[name]
        if name in self.header.unmoved:
            raise SubspaceError(f"module {name!r} has no alignment matrix: aligned and unaligned are equal there.")
        raise SubspaceError(f"subspace {self.source!r} has no module {name!r}{nearest(name, self.modules)}")

    @full_precision()
    def tensors(self, keys: Sequence[str]) -> list[Tensor]:
        """Return tensors as they are stored, mapped from the file: do not write to them."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return [file.get_tensor(key) for key in keys]
        except (SafetensorError, OSError) as error:
            raise SubspaceError(f"subspace {self.source!r} changed or vanished since it was opened.") from error

    @cached_property
    def _spans(self) -> dict[str, tuple[int, int]]:
        try:
            return spans_of(self.path)
        except (OSError, ValueError) as error:
            raise SubspaceError(f"subspace {self.source!r} changed or vanished since it was opened.") from error

    def _announced(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The same requests; when one is taken, the disk begins to read what the next one needs."""
        coming = iter(requests)
        request = next(coming, None)
        while request is not None:
            following = next(coming, None)
            names = following.names if following else ()
            will_need(self.path, [self._spans[key] for name in names for key in self._module(name).tensors(name)])
            yield request
            request = following

    @full_precision()
    def _read_stack(self, names: Sequence[str], transposed: bool = False) -> AlignmentMatrix:
        keys = [key for name in names for key in self._module(name).tensors(name)]
        matrix = assemble(names, self.modules, dict(zip(keys, self.tensors(keys), strict=True)))
        return turned(matrix) if transposed else matrix
