"""Many small tensors to the CPU with one wait a device, not one a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each tensor on the CPU, detached and contiguous, bits as they are; one there already is not copied.

    Those of one device and dtype travel as one flat tensor, so that the host waits once for them.
    """
    on_host: list[Tensor] = [tensor.detach() for tensor in tensors]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(on_host):
        if tensor.device.type != "cpu":
            groups.setdefault((tensor.device, tensor.dtype), []).append(place)
    for places in groups.values():
        flat = torch.cat([on_host[place].reshape(-1) for place in places]).cpu()
        parts = flat.split([on_host[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            on_host[place] = part.view(on_host[place].shape)
    return [tensor.contiguous() for tensor in on_host]
