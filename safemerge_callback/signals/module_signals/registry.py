"""The one registry of module signals: what a live model says of each module before anything is decided.

A signal is a function of `CheckData` that gives each module a number. The numbers go into the readings, by name, and
from there into the journal; a gate or a rule reads them there. Its name is the need that opens it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from ...errors import ConfigError
from ...live.engine import ENGINES
from ..check_data import DATA_NEEDS, CheckData

Function = Callable[[CheckData], Mapping[str, float]]


@dataclass(frozen=True)
class ModuleSignal:
    """A number a module: `function(data)` gives it on every rank, finite or NaN; what it raises costs the check.

    `needs`: those of `DATA_NEEDS`. `engines`: those of `ENGINES` on which it can be taken. `cost`: in words, in
    forward and backward passes. Rank 0's numbers count. It leaves the model as it was (`preserve_state`).
    """

    name: str
    function: Function
    needs: frozenset[str]
    cost: str
    engines: frozenset[str]


MODULE_SIGNALS: dict[str, ModuleSignal] = {}


def module_signal(
    *, needs: Collection[str], cost: str, engines: Collection[str] = ENGINES
) -> Callable[[Function], Function]:
    """Enter a module signal under its function's own name; ValueError for a need or an engine that there is not."""
    if unknown := (set(needs) - set(DATA_NEEDS)) | (set(engines) - set(ENGINES)):
        raise ValueError(f"{sorted(unknown)} are no needs of {sorted(DATA_NEEDS)} and no engines of {list(ENGINES)}")

    def enter(function: Function) -> Function:
        name = function.__name__
        MODULE_SIGNALS[name] = ModuleSignal(name, function, frozenset(needs), cost, frozenset(engines))
        return function

    return enter


def signals_among(needs: Iterable[str]) -> list[ModuleSignal]:
    """Return the module signals among these needs, in the order in which they were entered."""
    wanted = set(needs)
    return [signal for name, signal in MODULE_SIGNALS.items() if name in wanted]


def data_among(needs: Mapping[str, str]) -> dict[str, str]:
    """Return need -> who has it of all data that these needs come to, those of module signals among them."""
    data = {need: who for need, who in needs.items() if need in DATA_NEEDS}
    for signal in signals_among(needs):
        data = {**dict.fromkeys(signal.needs, needs[signal.name]), **data}
    parts = {part: who for need, who in data.items() for part in DATA_NEEDS[need]}
    return {**parts, **data}


def check_engine(needs: Mapping[str, str], engine: str) -> None:
    """Raise ConfigError for the first signal among the needs that this engine does not let be taken."""
    for signal in signals_among(needs):
        if engine not in signal.engines:
            raise ConfigError(
                f"{needs[signal.name]} needs {signal.name!r}, which is taken on {sorted(signal.engines)}, and this "
                f"training is under {engine}: train with one of those, or choose another"
            )
