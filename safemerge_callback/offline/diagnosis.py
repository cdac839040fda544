"""What is installed, what a model and an adapter allow, and what is missing: found out without loading a model."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires
from typing import Literal, NamedTuple

from ..adapters import Adapter, load_adapter
from ..adapters.beside import left_beside, listed
from ..errors import SafeMergeError
from ..evaluation.loading import accelerator, is_adapter, load_tokenizer
from ..record.entries import versions_of
from ..subspace import CheckpointShards
from ..subspace.checkpoints.targets import is_linear

# `problem`: something will be refused. `note`: something cannot be had as it is, and need not be.
State = Literal["ok", "note", "problem"]
_PACKAGE = "safemerge-callback"
# Extras of who changes the package.
_OURS = ("dev", "docs")
_HOSTS = ("axolotl", "llamafactory", "ms-swift")
_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_REQUIRED = re.compile(r"(?P<name>[\w.-]+)(>=(?P<bound>[\d.]+))?(.*extra == ['\"](?P<extra>[\w-]+)['\"])?")


class Finding(NamedTuple):
    """One thing that was looked at: what, in which state it is, and a sentence."""

    what: str
    state: State
    words: str

    def __str__(self) -> str:
        """Such as `ok       torch: 2.13.0`."""
        return f"{self.state:<8} {self.what}: {self.words}"


def diagnosis(model: str | None = None, adapter: str | None = None) -> list[Finding]:
    """Return what is found of the packages here, and of a model and a LoRA adapter, each a folder or a Hub id.

    A `model` that is an adapter counts as one; without a model an adapter's base is what its config names. Headers and
    small files are read, and an adapter's factors. What cannot be read is a finding, not an error.
    """
    findings = [*_packages(), *_machine()]
    try:
        if model is not None and adapter is None and is_adapter(model):
            model, adapter = None, model
        stored = load_adapter(adapter) if adapter is not None else None
    except SafeMergeError as error:
        return [*findings, Finding("adapter" if adapter else "model", "problem", str(error))]
    if stored is not None:
        findings += _adapter(stored)
        model = model or stored.base_model
        if model is None:
            return [*findings, Finding("model", "note", "the adapter's config names no base: give MODEL, too")]
    if model is None:
        return findings
    try:
        shards = CheckpointShards.open(model)
    except SafeMergeError as error:
        return [*findings, Finding("model", "problem", str(error))]
    return [*findings, *_model(model, shards), *(_fit(stored, shards) if stored is not None else [])]


def _packages() -> Iterator[Finding]:
    yield Finding("python", "ok", platform.python_version())
    try:
        needed = [match for line in requires(_PACKAGE) or () if (match := _REQUIRED.match(line))]
    except PackageNotFoundError:
        yield Finding(_PACKAGE, "note", "it is not installed, so what it needs is not known: pip install .")
        return
    extras: dict[str, dict[str, str | None]] = {}
    for match in needed:
        if match["extra"] is None:
            yield _package(match["name"], match["bound"])
        elif match["extra"] not in _OURS:
            extras.setdefault(match["extra"], {})[match["name"]] = match["bound"]
    for extra, packages in extras.items():
        lacking = [name for name, bound in packages.items() if _package(name, bound).state != "ok"]
        words = f"{', '.join(lacking)} absent or old: pip install '{_PACKAGE}[{extra}]'"
        yield Finding(f"extra {extra}", *(("note", words) if lacking else ("ok", "complete")))
    hosts = {name: one for name, one in versions_of(*_HOSTS).items() if one is not None}
    if hosts:
        yield Finding("hosts", "ok", ", ".join(f"{name} {one}" for name, one in hosts.items()))


def _package(name: str, bound: str | None) -> Finding:
    installed = versions_of(name)[name]
    if installed is None:
        return Finding(name, "problem", f"not installed: pip install '{name}>={bound or 0}'")
    if bound is not None and _release(installed) < _release(bound):
        return Finding(name, "problem", f"{installed} is older than {bound}: pip install -U '{name}>={bound}'")
    return Finding(name, "ok", installed)


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def _machine() -> Iterator[Finding]:
    processes = os.environ.get("WORLD_SIZE", "1")
    yield Finding("device", "ok", f"{accelerator()}, {processes} process{'' if processes == '1' else 'es'}")


def _adapter(adapter: Adapter) -> Iterator[Finding]:
    ranks = sorted({one.rank for one in adapter.factors.values()})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    base = f", base {adapter.base_model}" if adapter.base_model else ""
    words = f"a plain LoRA of rank {span} in {len(adapter.factors)} modules{base}: measure, merge, pull, bake"
    yield Finding("adapter", "ok", words)
    if left := left_beside(adapter, lambda _: None):
        yield Finding("adapter", "note", f"it also holds {'; '.join(left)}, which merges leave as they are")


def _model(model: str, shards: CheckpointShards) -> Iterator[Finding]:
    linear = [name for name in shards.names if is_linear(name)]
    kind = shards.located.architecture or "a model"
    if shards.quantised:
        words = f"{len(shards.quantised)} modules are packed ({next(iter(shards.quantised.values()))})"
        yield Finding("model", "note", f"{kind}: {words}, of which no subspace is built: give the unpacked checkpoint")
    else:
        words = f"{kind} with {len(linear)} linear layers in safetensors: a subspace can be built with its counterpart"
        yield Finding("model", "ok", words)
    yield _head(shards.located.config)
    yield _template(model)


def _head(config: Mapping[str, object]) -> Finding:
    names = config.get("architectures")
    names = [str(name) for name in names] if isinstance(names, list) else []
    if not names:
        return Finding("language head", "note", "config.json names no architecture, so it is not known")
    if not any(name.endswith(_HEADS) for name in names) or config.get("is_encoder_decoder"):
        words = f"{', '.join(names)} says no next tokens: replay, harvest, eval and gate need a causal language model"
        return Finding("language head", "problem", words)
    return Finding("language head", "ok", names[0])


def _template(model: str) -> Finding:
    try:
        tokenizer = load_tokenizer(model, who="model")
    except SafeMergeError as error:
        return Finding("chat template", "problem", str(error))
    if not tokenizer.chat_template:
        words = "none, so nothing can be asked (replay, harvest, eval, gate): give a chat or instruct model"
        return Finding("chat template", "problem", words)
    return Finding("chat template", "ok", "replay, harvest, eval and gate can ask the model")


def _fit(adapter: Adapter, shards: CheckpointShards) -> Iterator[Finding]:
    lacking = [name for name in adapter.factors if name not in shards.names]
    # A checkpoint may hold a weight the other way round.
    shapes = {name: sorted(one.shape) for name, one in adapter.factors.items() if name not in lacking}
    other = [name for name, shape in shapes.items() if sorted(shards.shape(name)) != shape]
    if lacking or other:
        parts = [f"the model lacks {listed(lacking)}"] if lacking else []
        parts += [f"{listed(other)} are of another shape there"] if other else []
        yield Finding("adapter on model", "problem", f"{'; '.join(parts)}: give the base that it was trained on")
    else:
        yield Finding("adapter on model", "ok", f"all {len(shapes)} modules are there, in their shapes")
