"""New values into slots: all ranks check, agree and write, or put back; apart, since it knows no model, only slots."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import AdapterError, nearest
from ...ops import LowRank, full_precision
from ..ranks import agree, all_or_none, copy_from_first, everyones, many
from .slots import Slot


class FactorSlots(NamedTuple):
    """The slots of one module's factors."""

    A: Slot
    B: Slot


class SlotChange(NamedTuple):
    """A slot, the value it will take (its wide dtype, its device), and whose it is."""

    name: str
    slot: Slot
    value: Tensor


@full_precision()
def commit(pairs: Mapping[str, FactorSlots], new: Mapping[str, LowRank]) -> None:
    """Write A and B of the modules in `new` into their slots, or change nothing. Collective with many processes.

    Raises AdapterError on every rank for an unknown name, another shape or a value that is not finite on any of them,
    before anything is written, and when a write fails, after everything was put back; ProcessesError where ranks
    write different modules.
    """
    changes = all_or_none(lambda: planned(pairs, new))
    agree("the list of modules to write", _words([change.name for change in changes]))
    copy_from_first(change.value for change in changes)
    before = read_all([change.slot for change in changes], copy=True)
    try:
        failed = _store(changes, [change.value for change in changes])
    except BaseException:
        # Not with others: they are elsewhere, and what is collective would wait for them.
        if not many():
            _store(changes, before)
        raise
    faults = everyones(_described(failed))
    if any(faults):
        _put_back(changes, before, failed, faults)


def planned(pairs: Mapping[str, FactorSlots], new: Mapping[str, LowRank]) -> list[SlotChange]:
    """What to write where, checked, cast, and on the slots' devices; on this rank alone."""
    unknown = sorted(set(new) - set(pairs))
    if unknown:
        raise AdapterError(
            f"{len(unknown)} modules to write are not LoRA modules of the model, first {unknown[0]!r}"
            f"{nearest(unknown[0], pairs, then='nothing was written')}"
        )
    changes = [
        _change(name, letter, slot, value)
        for name, factors in new.items()
        for letter, slot, value in zip("AB", pairs[name], factors, strict=True)
    ]
    _require_finite(changes)
    return changes


@full_precision()
def read_all(slots: Sequence[Slot], *, copy: bool = False) -> list[Tensor]:
    """Return the whole of each slot, opening each unit once; `copy` gives no live tensor."""
    tensors: list[Tensor] = []
    for group in _by_unit(slots, lambda slot: slot):
        with group[0].opened(write=False):
            tensors += [slot.read().clone() if copy else slot.read() for slot in group]
    return tensors


@full_precision()
def _store(changes: Sequence[SlotChange], values: Sequence[Tensor]) -> dict[str, Exception]:
    """Write each value, all of them even after one has failed, since other ranks wait at the next; the failures."""
    failed: dict[str, Exception] = {}
    for group in _by_unit(list(zip(changes, values, strict=True)), lambda item: item[0].slot):
        with group[0][0].slot.opened(write=True):
            for change, value in group:
                try:
                    change.slot.write(value)
                except Exception as error:
                    failed[change.name] = error
    # Within an autocast that was opened outside, a forward would go on with the casts of the old values.
    torch.clear_autocast_cache()
    return failed


def _put_back(
    changes: Sequence[SlotChange], before: Sequence[Tensor], failed: Mapping[str, Exception], faults: list[str | None]
) -> None:
    """Undo on all ranks and raise AdapterError on all, saying what could not be undone on any."""
    old = {change.name: value for change, value in zip(changes, before, strict=True)}
    slots = {change.name: change.slot for change in changes}
    # A slot that refuses to be written at all still holds its old value.
    here = [name for name in _store(changes, before) if not slots[name].holds(old[name])]
    lost = sorted({name for names in everyones(here) for name in names})
    first = next(rank for rank, fault in enumerate(faults) if fault)
    where = f" on rank {first}" if many() else ""
    ending = f"but {lost} could not be put back: stop this run" if lost else "everything was put back"
    raise AdapterError(f"writing {faults[first]}{where}; {ending}.") from next(iter(failed.values()), None)


def _described(failed: Mapping[str, Exception]) -> str | None:
    """The first failure in words."""
    return next((f"{name!r} failed ({error or type(error).__name__})" for name, error in failed.items()), None)


def _by_unit(items: Sequence[Any], slot_of: Callable[[Any], Slot]) -> Iterator[list[Any]]:
    """Runs of items whose slots are opened together."""
    for _, group in groupby(items, key=lambda item: slot_of(item).unit):
        yield list(group)


def _words(names: Sequence[str]) -> str:
    mark = hashlib.blake2b("\n".join(names).encode(), digest_size=4).hexdigest()
    return f"{len(names)} factors, first {names[0] if names else 'none'} (digest {mark})"


def _change(name: str, letter: str, slot: Slot, value: Tensor) -> SlotChange:
    if value.shape != slot.shape:
        raise AdapterError(
            f"module {name!r}: the new {letter} is {tuple(value.shape)} but the live one {tuple(slot.shape)}; a live "
            "adapter keeps its rank and size. Nothing was written."
        )
    # A copy even where nothing is cast: a new value may be a view of a live tensor that is written before it.
    return SlotChange(f"{name}.lora_{letter}", slot, value.detach().to(slot.device, slot.wide, copy=True).contiguous())


def _require_finite(changes: list[SlotChange]) -> None:
    """One synchronisation for all modules of a device; asked in the dtype of the narrowest copy."""
    by_device: dict[torch.device, list[SlotChange]] = {}
    for change in changes:
        by_device.setdefault(change.value.device, []).append(change)
    for group in by_device.values():
        finite = torch.stack([change.value.to(change.slot.narrow).isfinite().all() for change in group]).tolist()
        bad = [change for change, fine in zip(group, finite, strict=True) if not fine]
        if bad:
            raise AdapterError(
                f"{len(bad)} of {len(changes)} new factors are not finite in {bad[0].slot.narrow}, first "
                f"{bad[0].name!r}. Nothing was written."
            )
