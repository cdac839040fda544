"""How far a term moves the parameters along a gradient: a norm, as papers have it, or a share of the parameters' own.

A norm in factor space means another thing at another rank and number of modules: factors of rank r begin with a norm of
about sqrt(r/3) a module. A share of it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, shown
from ..io.numbers import is_number
from ..live.gradients import TrainedParameters
from .protocol import TermPass


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


def contrast(
    loss: Callable[[nn.Module], Tensor],
    trained: TrainedParameters,
    way: float,
    *,
    norm: float | None,
    share: float | None,
) -> Generator[TermPass, Tensor, None]:
    """Yield a loss h where the parameters are, and -h a step along its gradient (`way` 1) or against it (-1)."""
    gradient = yield TermPass(1.0, loss)
    yield TermPass(-1.0, loss, along(way * gradient, trained, norm=norm, share=share))


def check_weight(weight: Any) -> None:
    """Raise ConfigError for what is no λ."""
    if not is_number(weight) or weight < 0:
        raise ConfigError(f"weight is {shown(weight)}: give λ, a number of 0 (off) or more")


def along(gradient: Tensor, trained: TrainedParameters, *, norm: float | None, share: float | None) -> Tensor:
    """Return a gradient (n,), as `trained.vector`, scaled to a norm, or to a share of the parameters'; 0 where it is 0.

    Collective under FSDP; nothing waits for the device.
    """
    size = trained.norm(gradient)
    length = torch.full_like(size, norm) if norm is not None else (share or 0.0) * trained.norm(trained.values())
    factor = torch.where(size > 0, length / size, 0.0)
    return gradient * factor.to(gradient.dtype)
