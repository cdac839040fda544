"""The inputs of the verbs on files, opened; and their modules in runs that fit in little memory."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..adapters import Adapter, open_adapter
from ..adapters.beside import Base, beside_factors
from ..adapters.lazy_mapping import OnAccess
from ..decision import Choices, needs_of
from ..decision.unmerged import unmerged, warning_of
from ..errors import ConfigError, PlanError, shown
from ..io.addresses import source_name
from ..subspace import Subspace

AdapterSource = str | Path | Adapter
# What a run of modules may take while it is worked on: widened factors, and alignment matrices as stored.
CHUNK_BYTES = 32 << 20


def adapter_of(source: AdapterSource) -> Adapter:
    """Return the adapter, its modules in the order of their layers: a file has layer 10 before layer 2."""
    adapter = source if isinstance(source, Adapter) else open_adapter(source)
    if isinstance(adapter.factors, OnAccess):
        return replace(adapter, factors=adapter.factors.ordered(_natural))
    return replace(adapter, factors=dict(sorted(adapter.factors.items(), key=lambda item: _natural(item[0]))))


def adapters_of(sources: AdapterSource | Sequence[AdapterSource] | None) -> tuple[Adapter, ...]:
    """Return one adapter, several, or none, opened."""
    return tuple(map(adapter_of, listed(sources)))


def listed(sources: AdapterSource | Sequence[AdapterSource] | None) -> list[AdapterSource]:
    """Return one adapter, several, or none as a list; ConfigError for anything else."""
    if sources is None:
        return []
    if isinstance(sources, str | Path | Adapter):
        return [sources]
    if not isinstance(sources, Sequence):
        raise ConfigError(f"safety adapters are {shown(sources)}: give a folder or Hub id, or a list of them")
    return list(sources)


def subspace_of(source: str | Path | Subspace) -> Subspace:
    """Return the subspace of a file, a folder or a Hub id, opened."""
    return source if isinstance(source, Subspace) else Subspace.from_pretrained(source)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def chunks(names: Iterable[str], task: Adapter, subspace: Subspace | None = None) -> Iterator[list[str]]:
    """Yield `names` in runs of at most 32 MiB of widened factors, and of V where `subspace` is given; at least one."""
    run: list[str] = []
    total = 0
    for name in names:
        module = task.factors[name]
        size = 16 * module.rank * (module.d_out + module.d_in)
        if subspace is not None and name in subspace.modules:
            size += subspace.modules[name].bytes(name)
        if run and total + size > CHUNK_BYTES:
            yield run
            run, total = [], 0
        run.append(name)
        total += size
    if run:
        yield run


def check_merges(choices: Choices, *, has_safety: bool) -> None:
    """Refuse a gate that merges nothing, a method that only a training has the means for, and a missing safety adapter.

    Raises ConfigError for the first two, PlanError for the last.
    """
    gate, needs = choices.gate, needs_of(choices.how, choices.gate, choices.rules)
    if not gate.merges:
        raise ConfigError(f"gate {gate.name!r} merges nothing: measure the adapter instead, or choose another gate.")
    if "average" in needs:
        raise ConfigError(f"{needs['average']} goes to the average of a run's own updates: use it in training.")
    if not has_safety and "safety_adapter" in needs:
        compares = " to compare cosines with" if needs.get("safety_cosines") == needs["safety_adapter"] else ""
        raise PlanError(
            f"{needs['safety_adapter']} needs a safety adapter{compares}, got none: give its folder or Hub id."
        )


def named_parts(task: Adapter, safety: Sequence[Adapter], subspace: Subspace) -> dict[str, str | None]:
    """What was put together, by Hub id or folder name; paths of this machine stay out of what may be published."""
    return {
        "finetuned": _shown(task.source),
        "safety_adapter": ", ".join(_shown(adapter.source) for adapter in safety) or None,
        "subspace": subspace.name,
        "aligned": subspace.aligned.get("source"),
        "unaligned": subspace.unaligned.get("source") or subspace.unaligned.get("alignment_adapter"),
    }


def _shown(source: str) -> str:
    return source_name(source) if Path(source).expanduser().exists() else source


def left_out(safety: Sequence[Adapter], modules: Collection[str], base: Base, level: int) -> str | None:
    """Return what a merge of `safety` into the LoRA `modules` leaves out, and warn of it; None where it is nothing."""
    left = {adapter.source: words for adapter in safety if (words := unmerged(adapter, modules, base))}
    if warning := warning_of(left):
        warnings.warn(f"safemerge: {warning}", stacklevel=level)
    return "; ".join(f"{_shown(source)}: {words}" for source, words in left.items()) or None


def copies_of_base(task: Adapter) -> Base:
    """Return the base model's tensors of which the fine-tuned adapter holds a copy that was not trained."""
    copies = {
        name: beside.whole for name, beside in beside_factors(task).items() if beside.whole and not beside.trained
    }
    return lambda name: task.extra[copies[name]] if name in copies else None


def warn_of_other_bases(task: Adapter, safety: Sequence[Adapter], subspace: Subspace, level: int) -> None:
    """Names are no proof either way (a copy may be called anything), so this warns and does not refuse."""
    bases: dict[str, str | None] = {"the fine-tuned adapter": task.base_model}
    for place, other in enumerate(safety):
        bases["the safety adapter" if place == 0 else f"safety adapter {place + 1}"] = other.base_model
    bases["the subspace's aligned checkpoint"] = subspace.aligned.get("source")
    known = {who: Path(base).name for who, base in bases.items() if base}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{who}: {name!r}" for who, name in known.items())
        warnings.warn(f"safemerge: base models have different names ({listed}); they must be one", stacklevel=level)
