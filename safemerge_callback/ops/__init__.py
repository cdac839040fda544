"""Floor 0: tensors in, tensors out; torch only."""

from .alignment import AlignmentMatrix, Factored, Int8, moved, rows_of, turned
from .cosine import null_cosine, project, projected_cosine
from .interval import Known, cosine_interval
from .lowrank import LowRank, accumulation_dtype, inner_product, refit, squared_norm, truncate, weighted_sum, wide_dtype
from .precision import full_precision
from .spectral import spectral_bound

__all__ = [
    "AlignmentMatrix",
    "Factored",
    "Int8",
    "Known",
    "LowRank",
    "accumulation_dtype",
    "cosine_interval",
    "full_precision",
    "inner_product",
    "moved",
    "null_cosine",
    "project",
    "projected_cosine",
    "refit",
    "rows_of",
    "spectral_bound",
    "squared_norm",
    "truncate",
    "turned",
    "weighted_sum",
    "wide_dtype",
]
