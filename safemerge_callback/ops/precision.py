"""Arithmetic as the formulas have it, whatever a training, a notebook or a library has set for its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# Those that torch has an autocast for.
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "mtia", "maia", "hpu", "ipu", "xla", "privateuseone")
# What the two backends call a float32 product that is one; "none" is torch's default, which is the same.
_WHOLE = ("ieee", "none")


@contextmanager
def full_precision() -> Iterator[None]:
    """Within it, torch computes what is written down; everything is as before afterwards. A decorator too.

    - Autocast is off, on every device type: under it a product of float32 is one of bfloat16.
    - float32 products are float32: no TF32 on a GPU, no bfloat16 on a CPU. A training often allows TF32 (`tf32: true`),
      which keeps ten bits of a product: a cosine would lose three digits, and a merge that changes nothing would change
      everything a little.
    - What names no device is made on the CPU, whatever `torch.set_default_device` says.
    - No gradient is recorded, and outside of inference mode: what is made here may be trained on later.

    The default dtype belongs to all threads and is left alone: whatever draws or makes numbers here names its own.
    """
    with ExitStack() as borrowed:
        if torch.is_inference_mode_enabled():
            borrowed.enter_context(torch.inference_mode(False))
        borrowed.enter_context(torch.no_grad())
        for device in _AUTOCAST_DEVICES:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                torch.set_autocast_enabled(device, False)
                borrowed.callback(torch.set_autocast_enabled, device, True)
        if torch.empty(0).device.type != "cpu":
            borrowed.enter_context(torch.device("cpu"))
        if reduced_products():
            borrowed.enter_context(_whole_products())
        yield


def reduced_products() -> bool:
    """Return whether float32 products may be taken in fewer bits now. A setting of the process, not of a thread."""
    backends = _backends()
    if backends is None:
        return torch.get_float32_matmul_precision() != "highest"
    return any(backend.fp32_precision not in _WHOLE for backend in backends)


def _backends() -> list[Any] | None:
    """Where torch keeps how products are taken; None before 2.9, which has one setting for all."""
    mkldnn: Any = torch.backends.mkldnn
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(mkldnn, "matmul", None)]
    return backends if all(hasattr(backend, "fp32_precision") for backend in backends) else None


@contextmanager
def _whole_products() -> Iterator[None]:
    backends = _backends()
    if backends is None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    settings = [_setting_of(backend) for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, value in zip(backends, settings, strict=True):
            backend.fp32_precision = value


def _setting_of(backend: Any) -> str:
    """What the backend was set to; "none" where it only follows `torch.backends.fp32_precision`, and goes on to."""
    effective: str = backend.fp32_precision
    backend.fp32_precision = "none"
    return "none" if backend.fp32_precision == effective else effective
