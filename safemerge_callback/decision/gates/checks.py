"""Each knob of the gates: one refusal that prints the value, what is allowed and what to do."""

from __future__ import annotations

from ...errors import ConfigError, shown
from ...io.numbers import is_number, is_whole


def check_threshold(threshold: float) -> None:
    """Raise ConfigError unless `threshold` is a number in [0, 1]."""
    if not is_number(threshold) or not 0 <= threshold <= 1:
        raise ConfigError(f"threshold={shown(threshold)}: cosines lie in [0, 1], so give a number from 0 to 1")


def check_z_threshold(z_threshold: float) -> None:
    """Raise ConfigError unless `z_threshold` is a finite number."""
    if not is_number(z_threshold):
        raise ConfigError(
            f"z_threshold={shown(z_threshold)}: give a finite number of standard deviations; 0 is the cosine of an "
            "unrelated update, below 0 lies what is further from the subspace than that"
        )


def check_reference_fraction(reference_fraction: float) -> None:
    """Raise ConfigError unless `reference_fraction` is a number in (0, 1]."""
    if not is_number(reference_fraction) or not 0 < reference_fraction <= 1:
        raise ConfigError(
            f"reference_fraction={shown(reference_fraction)}: give the share of the safety adapter's own cosine below "
            "which a module is merged, above 0 and up to 1"
        )


def check_quantile(quantile: float | None) -> None:
    """Raise ConfigError unless `quantile` is a number in (0, 1]."""
    if not is_number(quantile) or not 0 < quantile <= 1:
        raise ConfigError(
            f"quantile={shown(quantile)}: gate 'quantile' needs a share of the modules, above 0 and up to 1"
        )


def check_num_layers(num_layers: int | None) -> None:
    """Raise ConfigError unless `num_layers` is a whole number of at least 1."""
    if not is_whole(num_layers, 1):
        raise ConfigError(
            f"num_layers={shown(num_layers)}: gate 'num_layers' needs a whole number of modules, 1 or more"
        )


def check_count_of(name: str, value: int) -> None:
    """Raise ConfigError unless `value`, the knob `name`, is a whole number of at least 0."""
    if not is_whole(value, 0):
        raise ConfigError(f"{name}={shown(value)}: give a whole number of 0 or more")


def check_rearm(rearm: float | None) -> None:
    """Raise ConfigError unless `rearm` is None or a number of at least 0."""
    if rearm is not None and (not is_number(rearm) or rearm < 0):
        raise ConfigError(
            f"rearm={shown(rearm)}: give how far above the gate a merged module must be seen before it is merged "
            "again, 0 or more, or leave it out"
        )
