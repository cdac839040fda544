"""Which entries of a matrix are kept: by magnitude, or by chance from a generator that is passed in.

Shapes: a mask has the shape of its tensor, (*n, rows, columns); every matrix of a batch is pruned by itself. Masks hold
0 and 1 in the tensor's dtype and lie on its device. Chance is always drawn on the CPU, whatever the tensor's device:
all ranks, and a run that resumes on another machine, draw the same.
"""

from __future__ import annotations

import hashlib

import torch

from .shapes import Float, Tensor


def mask_seed(seed: int, step: int, module: str) -> int:
    """Return the seed of a module's masks at an optimizer step, from 0 to 2⁶³ - 1: a pure function of the three.

    It is BLAKE2b of their text, so that neighbouring steps and modules share nothing, and every rank, and a resumed
    run, has the same.
    """
    digest = hashlib.blake2b(f"{seed}\n{step}\n{module}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def kept_count(entries: int, density: float) -> int:
    """Return how many of `entries` a share `density` keeps: rounded down as PEFT does, but never less than one."""
    return min(entries, max(1, int(density * entries)))


def magnitude_mask(tensor: Float[Tensor, "*n rows columns"], density: float) -> Float[Tensor, "*n rows columns"]:
    """Return the mask of the ⌊density·entries⌋ entries of largest magnitude.

    Source: the trim of TIES (Yadav et al. 2023, arXiv:2306.01708), as PEFT's `magnitude_based_pruning`, among
    equal entries too. Differs: at least one entry is kept.
    """
    flat = tensor.abs().flatten(-2)
    top = flat.topk(kept_count(flat.shape[-1], density), dim=-1, sorted=False).indices
    return torch.zeros_like(flat).scatter_(-1, top, 1.0).view_as(tensor)


def trimmed(tensor: Float[Tensor, "*n rows columns"], density: float) -> Float[Tensor, "*n rows columns"]:
    """Return the tensor with zeros outside its `magnitude_mask`; the tensor itself at density 1."""
    return tensor if density == 1 else tensor * magnitude_mask(tensor, density)


def dropped(
    tensor: Float[Tensor, "*n rows columns"], density: float, generator: torch.Generator
) -> Float[Tensor, "*n rows columns"]:
    """Return the tensor with each entry kept with probability `density`, and then divided by it.

    Source: DARE (Yu et al. 2023, arXiv:2311.03099), as PEFT's `random_pruning`, in its order of operations. At density
    1 the tensor itself, and the generator is left as it was.
    """
    if density == 1:
        return tensor
    return tensor * bernoulli_mask(torch.full_like(tensor, density), generator) / density


def band_mask(
    tensor: Float[Tensor, "*n rows columns"], density: float, outliers: float
) -> Float[Tensor, "*n rows columns"]:
    """Return the mask of the ⌊density·entries⌋ entries that come, by magnitude, after the ⌊outliers·entries⌋ largest.

    Source: Model Breadcrumbs (Davari and Belilovsky 2023, arXiv:2312.06795). Where density + outliers exceeds 1,
    fewer outliers are dropped: the density is what holds.
    """
    flat = tensor.abs().flatten(-2)
    entries = flat.shape[-1]
    count = kept_count(entries, density)
    skipped = min(int(outliers * entries), entries - count)
    band = flat.topk(count + skipped, dim=-1).indices[..., skipped:]
    return torch.zeros_like(flat).scatter_(-1, band, 1.0).view_as(tensor)


def bernoulli_mask(
    probability: Float[Tensor, "*n rows columns"], generator: torch.Generator
) -> Float[Tensor, "*n rows columns"]:
    """Return a mask whose entries are 1 with the probability given at their place, each by itself.

    The CPU `generator` is advanced in the order of the entries, in the dtype of `probability`: fed a generator of the
    same state, PEFT's `random_pruning` on the CPU draws the same mask, to the bit.
    """
    drawn = torch.bernoulli(probability.to("cpu"), generator=generator)
    return drawn.to(probability.device)


def keep_probabilities(
    tensor: Float[Tensor, "*n rows columns"], density: float, window: float
) -> Float[Tensor, "*n rows columns"]:
    """Return each entry's probability to be kept, by its magnitude's rank in its row; each row's mean is `density`.

    Source: MagPrune of DELLA (Deep et al. 2024, arXiv:2406.11617): linear in the rank, from density - window/2 for
    a row's smallest entry to density + window/2 for its largest.
    """
    order = tensor.abs().argsort(dim=-1, stable=True)
    steps = torch.linspace(-0.5, 0.5, tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
    # A row of one entry has no rank to go by.
    steps = steps if tensor.shape[-1] > 1 else torch.zeros_like(steps)
    return density + window * torch.empty_like(tensor).scatter_(-1, order, steps.expand_as(tensor))
