"""Several adapters of one base into one, by weights of their own in every module: no gate, and no subspace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..adapters import Adapter
from ..adapters.checkpoint import save_changed
from ..decision.fit import check_safety_adapter
from ..errors import ConfigError, shown
from ..io.card import caveat, escaped, front_matter
from ..io.choices import one_of
from ..methods import check_merge, get_method
from ..ops import LowRank
from .output import CARD, free_output, new_folder
from .parts import AdapterSource, adapters_of
from .small_files import copy_tokenizer

_METHODS = ("cat", "linear")


def fuse_adapters(
    adapters: Sequence[AdapterSource],
    weights: Mapping[str, Sequence[float]],
    output: str | Path,
    *,
    method: str = "cat",
    overwrite: bool = False,
) -> Path:
    """Write Σ_k λ_mk·ΔW_mk of every module m as one plain LoRA into `output`, and return the folder.

    `weights`: module -> one number an adapter, as `learn_expert_weights` gives them; every module of the first adapter.
    `method`: `cat`, exact, the ranks add up, or `linear`, cut to the first adapter's rank. What the adapters hold
    beside their factors, heads and biases, stays the first one's. Raises ConfigError for weights that do not fit and an
    output that may not be written, AdapterError for adapters of other modules; nothing is written then.
    """
    rule = get_method(one_of(method, _METHODS, "method"))
    target = fusion_output(adapters, output, method, overwrite=overwrite)
    first, *others = adapters_of(adapters)
    for other in others:
        check_safety_adapter(other, first.factors)
    _check_weights(first, weights, len(others))
    grown = 0 if rule.keeps_rank else 1
    ranks = {n: one.rank + grown * sum(o.factors[n].rank for o in others) for n, one in first.factors.items()}

    def merged() -> Iterator[tuple[str, LowRank]]:
        for name, live in first.factors.items():
            more = [other.factors[name].low_rank(unit=live.scaling) for other in others]
            A, B, _ = rule.merge(LowRank(live.A, live.B), more, weights=tuple(weights[name]), space="delta")
            yield name, LowRank(A, B)

    with new_folder(target) as folder:
        save_changed(folder, first, ranks, merged())
        (folder / CARD).write_text(_card([first, *others], weights, method), encoding="utf-8")
        copy_tokenizer(first.folder, folder)
    return target


def fusion_output(
    adapters: Sequence[AdapterSource], output: str | Path, method: str, *, overwrite: bool = False
) -> Path:
    """Return the folder of `fuse_adapters`; ConfigError for what it refuses of these, before any weight is learned."""
    one_of(method, _METHODS, "method")
    return free_output(output, adapters, overwrite)


def _check_weights(first: Adapter, weights: Mapping[str, Sequence[float]], others: int) -> None:
    if strangers := sorted(first.factors.keys() ^ weights.keys()):
        raise ConfigError(
            f"weights are of {len(weights)} modules and adapter {first.source!r} has {len(first.factors)}, the first "
            f"that only one of them has is {strangers[0]!r}: give those of every module"
        )
    for name, row in weights.items():
        if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != 1 + others:
            raise ConfigError(f"weights of {name!r} are {shown(row)}: give {1 + others} numbers, one an adapter")
        check_merge("linear", "delta", row)


def _card(adapters: Sequence[Adapter], weights: Mapping[str, Sequence[float]], method: str) -> str:
    rows = [f"| {escaped(name)} | {' / '.join(f'{w:.3f}' for w in row)} |" for name, row in weights.items()]
    sources = ", ".join(escaped(Path(adapter.source).name) for adapter in adapters)
    head = [
        front_matter(adapters[0].base_model),
        "# LoRA adapter fused of several\n",
        f"Of {sources}, method {method}.\n",
    ]
    return "\n".join([*head, "| module | weights |", "|---|---|", *rows, "", caveat(), ""])
