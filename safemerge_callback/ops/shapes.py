"""Array shapes in signatures: jaxtyping's where it is installed (tests check them), plain tensors otherwise."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING or find_spec("jaxtyping"):
    from jaxtyping import Float as Float
else:

    class Float:
        """Stand-in that reads `Float[Tensor, "r d_in"]` as `Tensor`."""

        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]


__all__ = ["Float", "Tensor"]
