"""Which numbers of a check are sent whatever decides."""

from safemerge_callback.record import METRICS

# Without what the live model was asked for.
EVERY_CHECK = METRICS.keys() - {"safemerge/safety_slope_mean", "safemerge/gram_cosine_mean"}
