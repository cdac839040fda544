"""Floor 1: tensors in, tensors out; torch only."""

from .alignment import AlignmentMatrix, Factored, Int8, moved, rows_of, turned
from .basis import Basis, leading_basis, project_on_basis
from .consensus import SIGN_METHODS, balances, disjoint_mean, elected
from .cosine import Cosines, cosines, null_cosine, project, projected_cosine
from .grams import Grams, Regression, gram_cosine, regression, unused_features
from .interval import Known, cosine_interval
from .lowrank import (
    LowRank,
    accumulation_dtype,
    all_finite,
    column_space,
    inner_product,
    refit,
    refit_dense,
    refit_products,
    squared_norm,
    truncate,
    weighted_sum,
    wide_dtype,
)
from .output_moments import OutputMoments, output_moments, output_ratio, rescaled_outputs
from .precision import full_precision, reduced_products
from .pruned_rows import PrunedRows
from .rank_spaces import aligned_ranks, rank_similarity
from .sparsify import (
    band_mask,
    bernoulli_mask,
    dropped,
    keep_probabilities,
    kept_count,
    magnitude_mask,
    mask_seed,
    trimmed,
)
from .spectral import spectral_bound

__all__ = [
    "unused_features",
    "regression",
    "gram_cosine",
    "Regression",
    "Grams",
    "SIGN_METHODS",
    "AlignmentMatrix",
    "Basis",
    "Cosines",
    "Factored",
    "Int8",
    "Known",
    "LowRank",
    "OutputMoments",
    "PrunedRows",
    "accumulation_dtype",
    "aligned_ranks",
    "all_finite",
    "balances",
    "band_mask",
    "bernoulli_mask",
    "column_space",
    "cosine_interval",
    "cosines",
    "disjoint_mean",
    "dropped",
    "elected",
    "full_precision",
    "inner_product",
    "keep_probabilities",
    "kept_count",
    "leading_basis",
    "magnitude_mask",
    "mask_seed",
    "moved",
    "null_cosine",
    "output_moments",
    "output_ratio",
    "project",
    "project_on_basis",
    "projected_cosine",
    "rank_similarity",
    "reduced_products",
    "refit",
    "refit_dense",
    "refit_products",
    "rescaled_outputs",
    "rows_of",
    "spectral_bound",
    "squared_norm",
    "trimmed",
    "truncate",
    "turned",
    "weighted_sum",
    "wide_dtype",
]
