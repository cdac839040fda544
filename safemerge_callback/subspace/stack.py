"""From requests for alignment matrices to stacks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import SubspaceError
from ..ops import AlignmentMatrix, Factored, Int8, moved
from .header import ModuleHeader


class Request(NamedTuple):
    """A stack of alignment matrices wanted: modules of one shape and kind, where, and in which orientation."""

    names: tuple[str, ...]
    device: torch.device
    transposed: bool = False


# Names and orientation -> their stack on the CPU, out of the file.
Read = Callable[[Sequence[str], bool], AlignmentMatrix]


class Placement(Protocol):
    """Where alignment matrices live between one measure and the next."""

    def stacks(self, read: Read, requests: Iterable[Request]) -> Iterator[AlignmentMatrix]:
        """Yield the stack of each request in turn, on its device; `read` takes one out of the file."""


class FromFile:
    """Keep nothing: read each stack when it is asked for. One that is not copied stays mapped from the file."""

    def stacks(self, read: Read, requests: Iterable[Request]) -> Iterator[AlignmentMatrix]:
        """Yield the stack of each request in turn."""
        for request in requests:
            yield moved(read(request.names, request.transposed), request.device)


def assemble(
    names: Sequence[str], headers: Mapping[str, ModuleHeader], tensors: Mapping[str, Tensor]
) -> AlignmentMatrix:
    """Return one stack of modules out of their stored tensors; SubspaceError where shape or kind differ."""
    forms = {(headers[name].shape, headers[name].kind) for name in names}
    if len(forms) != 1:
        raise SubspaceError(f"stack takes modules of one shape and kind, got {len(forms)} of them: {sorted(forms)}.")
    kind = forms.pop()[1]
    if kind == "dense":
        return _stacked([tensors[f"{name}.V"] for name in names])
    if kind == "int8":
        scale = _stacked([tensors[f"{name}.scale"] for name in names])
        return Int8(_stacked([tensors[f"{name}.Q"] for name in names]), scale[..., None])
    rank = max(headers[name].rank or 0 for name in names)
    pad = torch.nn.functional.pad
    U = [pad(tensors[f"{name}.U"], (0, rank - (headers[name].rank or 0))) for name in names]
    W = [pad(tensors[f"{name}.W"], (0, 0, 0, rank - (headers[name].rank or 0))) for name in names]
    return Factored(_stacked(U), _stacked(W))


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0][None]
    dtype = max((t.dtype for t in tensors), key=lambda d: d.itemsize)
    if {t.dtype for t in tensors} == {torch.float16, torch.bfloat16}:
        dtype = torch.float32
    return torch.stack([t.to(dtype) for t in tensors])
