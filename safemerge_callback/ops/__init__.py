"""Floor 0: tensors in, tensors out; torch only."""

from .cosine import AlignmentMatrix, Factored, null_cosine, project, projected_cosine
from .lowrank import LowRank, accumulation_dtype, inner_product, refit, squared_norm, truncate, weighted_sum, wide_dtype
from .precision import full_precision

__all__ = [
    "AlignmentMatrix",
    "Factored",
    "LowRank",
    "accumulation_dtype",
    "full_precision",
    "inner_product",
    "null_cosine",
    "project",
    "projected_cosine",
    "refit",
    "squared_norm",
    "truncate",
    "weighted_sum",
    "wide_dtype",
]
