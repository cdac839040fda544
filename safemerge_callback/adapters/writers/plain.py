"""Whole tensors on this process's device: one process, or each rank of DDP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import AdapterError, nearest
from ...ops import LowRank
from ..factors import LoraFactors, active_adapter, live_factors


class _Change(NamedTuple):
    """A live Parameter, the value it will take (its dtype and device), and whose it is."""

    name: str
    target: Tensor
    value: Tensor


class PlainWriter:
    """Edits the live Parameters in place, so that optimizer, DDP and the autograd graph keep the same objects."""

    def __init__(self, model: nn.Module, adapter_name: str | None = None) -> None:
        self._model = model
        # Fixed now: a trainer may switch the active adapter for a moment, to compute reference log-probabilities.
        self._adapter_name = active_adapter(model, adapter_name)
        live_factors(model, self._adapter_name)

    def gather(self) -> dict[str, LoraFactors]:
        """Return canonical name -> the live factors, detached but not copied."""
        live = live_factors(self._model, self._adapter_name)
        return {name: replace(f, A=f.A.detach(), B=f.B.detach()) for name, f in live.items()}

    @torch.no_grad()
    def write(self, new: Mapping[str, LowRank]) -> None:
        """Replace the factors of the modules in `new`: A (r, d_in), B (d_out, r), cast once to the live dtype.

        Raises AdapterError for an unknown name, another shape or a value that is not finite in the live dtype, before
        anything is written; and when a copy fails, after everything was put back.
        """
        _copy_all(_planned(live_factors(self._model, self._adapter_name), new))


def _planned(live: Mapping[str, LoraFactors], new: Mapping[str, LowRank]) -> list[_Change]:
    """What to copy where, checked, cast to the live dtype and device."""
    unknown = sorted(set(new) - set(live))
    if unknown:
        raise AdapterError(
            f"{len(unknown)} modules to write are not LoRA modules of the model, first {unknown[0]!r}"
            f"{nearest(unknown[0], live)}. Nothing was written."
        )
    changes = [
        _change(name, letter, target, value)
        for name, factors in new.items()
        for letter, target, value in (("A", live[name].A, factors.A), ("B", live[name].B, factors.B))
    ]
    _require_finite(changes)
    return changes


def _copy_all(changes: list[_Change]) -> None:
    """Copy every value, or put back every target that was touched and raise AdapterError."""
    before = [change.target.detach().clone() for change in changes]
    touched = 0
    try:
        for change in changes:
            touched += 1
            change.target.copy_(change.value)
    except BaseException as error:
        lost = _put_back(changes[:touched], before[:touched])
        if lost or isinstance(error, Exception):
            ending = f"but {lost} could not be put back: stop this run" if lost else "everything was put back"
            raise AdapterError(
                f"writing {changes[touched - 1].name!r} failed ({error or type(error).__name__}); {ending}."
            ) from error
        raise


def _put_back(changes: list[_Change], before: list[Tensor]) -> list[str]:
    """Undo `changes`; return the names of those whose old value could not be restored."""
    lost = []
    for change, old in zip(changes, before, strict=True):
        try:
            change.target.copy_(old)
        except Exception:
            # A target that refuses to be written at all still holds its old value.
            if not torch.equal(change.target, old):
                lost.append(change.name)
    return lost


def _change(name: str, letter: str, target: Tensor, value: Tensor) -> _Change:
    if value.shape != target.shape:
        raise AdapterError(
            f"module {name!r}: the new {letter} is {tuple(value.shape)} but the live one {tuple(target.shape)}; a live "
            "adapter keeps its rank and size. Nothing was written."
        )
    # A copy even where nothing is cast: a new value may be a view of a live tensor that is written before it.
    return _Change(f"{name}.lora_{letter}", target, value.detach().to(target.device, target.dtype, copy=True))


def _require_finite(changes: list[_Change]) -> None:
    """One synchronisation for all modules of a device."""
    by_device: dict[torch.device, list[_Change]] = {}
    for change in changes:
        by_device.setdefault(change.value.device, []).append(change)
    for group in by_device.values():
        finite = torch.stack([change.value.isfinite().all() for change in group]).tolist()
        bad = [change for change, fine in zip(group, finite, strict=True) if not fine]
        if bad:
            raise AdapterError(
                f"{len(bad)} of {len(changes)} new factors are not finite in {bad[0].value.dtype}, first "
                f"{bad[0].name!r}. Nothing was written."
            )
