"""A subset that is good and diverse: the greedy mode of a determinantal point process, its kernel never formed."""

from __future__ import annotations

import torch

from .shapes import Float, Tensor

# A gain below this share of the item's own size is rounding: what is left of it lies among those that were chosen.
_LEAST = 1e-9


def greedy_dpp(vectors: Float[Tensor, "n d"], quality: Float[Tensor, " n"], count: int) -> list[tuple[int, float]]:
    """Return up to `count` indices in the order chosen, each with the share of its item that was new: 1 down to 0.

    The kernel is K_ij = q_i·q_j·⟨v_i, v_j⟩ with v_i the unit vector along row i. Each step takes the i that makes
    log det K of the chosen largest: the one whose q_i² times the squared part of v_i outside the span of those chosen,
    its share, is largest; the first of equals. It ends early where nothing new is left. `quality` is not negative.
    float64; n·count·(d + count) operations, and n·count numbers besides the vectors.

    Source: Chen, Zhang and Zhou, arXiv:1709.05135, algorithm 1 (the incremental Cholesky factor).
    """
    units = torch.nn.functional.normalize(vectors.double(), dim=1)
    left = (units * units).sum(1)
    factor = units.new_zeros(min(count, len(units)), len(units))
    squares, chosen = quality.double() ** 2, list[tuple[int, float]]()
    while len(chosen) < len(factor):
        gains = torch.where(left > _LEAST, squares * left, torch.zeros_like(left))
        best = int(gains.argmax())
        if not gains[best] > 0:
            break
        step = len(chosen)
        chosen.append((best, float(left[best])))
        row = (units @ units[best] - factor[:step].T @ factor[:step, best]) / left[best].sqrt()
        factor[step] = row
        left = left - row * row
        left[best] = 0.0
    return chosen
