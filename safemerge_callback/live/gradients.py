"""The gradients of the parameters that are trained, as vectors: whole on every rank, or a part on each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops import wide_dtype
from .modules import is_dtensor
from .ranks import many
from .writers.fsdp1 import is_fsdp1

# One for each parameter that is trained, in the model's order.
Gradients = list[Tensor | None]


@dataclass(frozen=True)
class TrainedParameters:
    """What is trained, and where the rest of each gradient is.

    `group`: the processes that hold the other parts of what is sharded, None where every gradient is whole; `longest`:
    the most numbers that one of them has. `local`: whether a whole gradient is this rank's own until the step's last
    batch, as under DDP.
    """

    parameters: tuple[nn.Parameter, ...]
    group: Any = None
    longest: int = 0
    local: bool = False

    @classmethod
    def of(cls, model: Any) -> TrainedParameters:
        """Look at a model once FSDP, DDP or nothing at all has taken it. Collective under FSDP."""
        trained = tuple(p for p in model.parameters() if p.requires_grad)
        sharded = next((p for p in trained if is_dtensor(p)), None)
        if sharded is None and not is_fsdp1(model):
            return cls(trained, local=many())
        group = model.process_group if sharded is None else _shard_group(sharded)
        longest = torch.tensor(sum(_here(p).numel() for p in trained), device=_here(trained[0]).device)
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
        return cls(trained, group, int(longest))

    def gradients(self) -> Gradients:
        """Return the gradients themselves, not copied."""
        return [p.grad for p in self.parameters]

    def restore(self, gradients: Gradients) -> None:
        """Put these in the place of the gradients; they are not copied."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def vector(self, gradients: Gradients) -> Tensor:
        """Return what this rank has of them as one new vector (n,), at least in float32; 0 where there is none."""
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients, strict=True)]
        flat = [_here(part).flatten() for part in parts]
        wide = torch.promote_types(flat[0].dtype, torch.float32)
        return torch.cat([part.to(flat[0].device, wide) for part in flat])

    def mean(self, vector: Tensor) -> Tensor:
        """Return its mean over the ranks where a gradient is each rank's own, in place. Collective there."""
        if self.local:
            dist.all_reduce(vector)
            vector /= dist.get_world_size()
        return vector

    def norm(self, vector: Tensor) -> Tensor:
        """Return the norm of all there is of a vector, a scalar in `wide_dtype`. Collective under FSDP."""
        return self.products([vector])[0, 0].sqrt()

    def values(self) -> Tensor:
        """Return this rank's part of the parameters themselves, as `vector`."""
        return self.vector([p.detach() for p in self.parameters])

    @contextmanager
    def displaced(self, vector: Tensor) -> Iterator[None]:
        """Within, the parameters have this much more, (n,) as `vector`; afterwards the bits that they had.

        As `put_back`.
        """
        here = [_here(p) for p in self.parameters]
        with put_back(here) as copies:
            for part, copy, more in zip(here, copies, _parts(vector, here), strict=True):
                part.copy_(copy + more)
            yield

    def add(self, vector: Tensor, spare: Gradients) -> None:
        """Add a vector (n,) to the gradients; where a parameter has none, its `spare` one, overwritten, takes it."""
        parts = _parts(vector, [_here(p) for p in self.parameters])
        for parameter, part, other in zip(self.parameters, parts, spare, strict=True):
            if parameter.grad is None and other is not None:
                _here(other).zero_()
                parameter.grad = other
            if parameter.grad is not None:
                here = _here(parameter.grad)
                here.copy_(here + part)

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return the inner products of all there is of k vectors, (k, k) in `wide_dtype`. Collective under FSDP."""
        rows = torch.stack(list(vectors))
        rows = rows.to(wide_dtype(rows.device))
        table = rows @ rows.T
        if self.group is not None:
            dist.all_reduce(table, group=self.group)
        return table

    def whole(self, vector: Tensor) -> list[Tensor]:
        """Return all there is of a vector: a view in each parameter's shape, or what every rank has, (ranks, n).

        Of the latter there is one, and ranks with less than the others have zeros behind it. Collective under FSDP.
        """
        if self.group is None:
            sizes = [p.numel() for p in self.parameters]
            return [part.view_as(p) for part, p in zip(vector.split(sizes), self.parameters, strict=True)]
        part = torch.nn.functional.pad(vector, (0, self.longest - len(vector)))
        everyones = part.new_empty(dist.get_world_size(self.group) * len(part))
        dist.all_gather_into_tensor(everyones, part, group=self.group)
        return [everyones.view(-1, len(part))]

    def put(self, wholes: Sequence[Tensor], spare: Gradients) -> None:
        """Write what `whole` gave, changed, into the gradients; where a parameter has none, into its `spare` one."""
        if self.group is None:
            parts = [whole.flatten() for whole in wholes]
        else:
            sizes = [_here(p).numel() for p in self.parameters]
            parts = list(wholes[0][dist.get_rank(self.group)][: sum(sizes)].split(sizes))
        for parameter, part, other in zip(self.parameters, parts, spare, strict=True):
            if parameter.grad is None:
                parameter.grad = other
            if parameter.grad is not None:
                here = _here(parameter.grad)
                here.copy_(part.view_as(here))


@dataclass
class PassGradient:
    """What one pass added: as `TrainedParameters.vector`, and the tensors that held it where nothing else was."""

    vector: Tensor = field(default_factory=lambda: torch.empty(0))
    tensors: Gradients = field(default_factory=list)


@contextmanager
def pass_gradient(trained: TrainedParameters | None, *, apart: bool) -> Iterator[PassGradient]:
    """Yield what the pass within adds, once it is over, as it is on this rank; nothing where `trained` is None.

    `apart`: take it out of the gradients again.
    """
    gradient = PassGradient()
    if trained is None:
        yield gradient
        return
    before = trained.gradients()
    earlier = None
    if apart:
        trained.restore([None] * len(before))
    elif any(one is not None for one in before):
        earlier = trained.vector(before)
    yield gradient
    gradient.tensors = trained.gradients()
    gradient.vector = trained.vector(gradient.tensors)
    if earlier is not None:
        gradient.vector -= earlier
    if apart:
        trained.restore(before)


@contextmanager
def put_back(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield copies of tensors, from which they have their bits back afterwards, whatever is written in between.

    What is added and taken away again in a tensor's own dtype leaves a rounding.
    """
    copies = [tensor.clone() for tensor in tensors]
    try:
        yield copies
    finally:
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy)


def _parts(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A vector as tensors of these shapes, on their devices; ValueError for another number of entries."""
    sizes = [part.numel() for part in like]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"a vector of the shape {tuple(vector.shape)} for {sum(sizes)} parameters of this rank")
    return [part.to(one.device).view_as(one) for part, one in zip(vector.split(sizes), like, strict=True)]


def _here(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, in the same memory; any other tensor as it is."""
    local = tensor.to_local() if is_dtensor(tensor) else tensor
    return local.detach()


def _shard_group(parameter: Any) -> Any:
    """The processes that share one copy of an FSDP2 parameter; replicas of it are in others."""
    cut = [n for n, placement in enumerate(parameter.placements) if placement.is_shard()]
    return parameter.device_mesh.get_group(cut[0] if cut else 0)
