"""How far a term moves the parameters along a gradient: a norm, as papers have it, or a share of the parameters' own.

A norm in factor space means another thing at another rank and number of modules: factors of rank r begin with a norm of
about sqrt(r/3) a module. A share of it does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, shown
from ..io.numbers import is_number
from ..live.gradients import TrainedParameters


def check_size(name: str, norm: Any, share: Any, default: float, *, of: str = "all that is trained") -> float | None:
    """Return the share in force, None where the norm `name` is; ConfigError for both, and for what is not above 0."""
    for setting, value in ((name, norm), ("share", share)):
        if value is not None and (not is_number(value) or value <= 0):
            raise ConfigError(f"{setting} is {shown(value)}: give a number above 0")
    if norm is None:
        if share is not None and share > 1:
            raise ConfigError(f"share is {shown(share)}: give a share of the norm of {of}, above 0 and at most 1")
        return default if share is None else float(share)
    if share is not None:
        raise ConfigError(
            f"{name} {shown(norm)} and share {shown(share)} are both given: give {name}, a norm, or share, of the norm "
            f"of {of}"
        )
    return None


def along(gradient: Tensor, trained: TrainedParameters, *, norm: float | None, share: float | None) -> Tensor:
    """Return a gradient (n,), as `trained.vector`, scaled to a norm, or to a share of the parameters'; 0 where it is 0.

    Collective under FSDP; nothing waits for the device.
    """
    size = trained.norm(gradient)
    length = torch.full_like(size, norm) if norm is not None else (share or 0.0) * trained.norm(trained.values())
    factor = torch.where(size > 0, length / size, 0.0)
    return gradient * factor.to(gradient.dtype)
