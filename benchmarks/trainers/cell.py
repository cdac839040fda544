"""One cell: run a trainer with the callback, and check from outside everything that the callback promises."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from safemerge_callback import SafeMergeError
from safemerge_callback.adapters.refusals import moves_base

from .witness import ModelWitness, best_of_rank, changed, dense, everything, factor_names, same
from .world import Base

WEIGHTS = (0.8, 0.2)
# The safety adapter of a family covers more modules than most cells train, which a run tells.
WIDER = "modules that the fine-tuned adapter lacks"
# Relative Frobenius distance to the dense formula; half-precision factors round each entry to about 2^-9.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


@dataclass
class Setup:
    """What a cell makes: its trainer, the base model loaded as before training to load the saved adapter on, and how
    to save that.
    """

    trainer: Trainer
    base: Callable[[], nn.Module]
    save: Callable[[Any, str], None] = Trainer.save_model


Make = Callable[[Base, str, list[TrainerCallback]], Setup]


@dataclass(frozen=True)
class TrainerCell:
    """A row of the table. `make(base, output, callbacks)` builds it; `knobs` are settings of the callback.

    `needs` says what a trainer asks for that a CPU does not have, `note` what a user should know of one that works,
    `warns` a part of the only warning that may come besides `WIDER`.
    """

    group: str
    name: str
    make: Make
    family: str = "llama"
    knobs: dict[str, Any] = field(default_factory=dict)
    needs: str = ""
    note: str = ""
    warns: str = ""


@dataclass(frozen=True)
class CellOutcome:
    """What a cell came to: works, refused, unavailable (the trainer itself does not run here) or FAILS; and why."""

    cell: TrainerCell
    status: str
    why: str = ""
    modules: int = 0
    merges: int = 0
    formula: float | None = None
    logits: float | None = None
    dtype: str = ""
    seconds: float = 0.0


def run(cell: TrainerCell, base: Base, output: Path) -> CellOutcome:
    """Run a cell and check it; whatever it raises is an outcome too."""
    began = time.perf_counter()
    try:
        facts = checked(cell, base, output)
        status, why = "works", cell.note
    except SafeMergeError as error:
        facts, status, why = {}, "refused", str(error)
    except Exception as error:
        alone = fails_alone(cell, base, output)
        facts, status, why = {}, "unavailable" if alone else "FAILS", alone or f"{type(error).__name__}: {error}"
    return CellOutcome(cell, status, why, seconds=time.perf_counter() - began, **facts)


def fails_alone(cell: TrainerCell, base: Base, output: Path) -> str | None:
    """What the same trainer raises without our callback; None where it runs."""
    try:
        cell.make(base, str(output / "alone"), ModelWitness().around(None)).trainer.train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def checked(cell: TrainerCell, base: Base, output: Path) -> dict[str, Any]:
    """Train with the callback and return the figures; AssertionError for a promise that does not hold."""
    torch.manual_seed(3)
    witness = ModelWitness()
    guard = base.guard(**cell.knobs)
    setup = cell.make(base, str(output), witness.around(guard))
    began = {name: tensor.detach().clone() for name, tensor in everything(setup.trainer.model).items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        setup.trainer.train()
    ours = [str(w.message) for w in caught if str(w.message).startswith("safemerge:")]
    ours = [message for message in ours if WIDER not in message]
    assert all(cell.warns and cell.warns in message for message in ours), ours
    adapter = cell.knobs.get("adapter_name") or _trained(setup.trainer.model)
    pairs = factor_names(next(iter(witness.before.values())), adapter)
    steps = sorted(witness.before)
    check_journal(output / "safemerge.jsonl", steps, set(pairs))
    check_untouched(witness, {name for pair in pairs.values() for name in pair})
    factors = [witness.before[steps[0]][name] for pair in pairs.values() for name in pair]
    began = began if moves_base(vars(setup.trainer.model.peft_config[adapter])) else {}
    distance = formula_distance(witness, steps, pairs, setup.trainer.model, adapter, base, began)
    dtype = factors[0].dtype
    assert distance <= TOLERANCE[dtype], f"merged updates are {distance:.1e} of a norm from the formula"
    logits = reload_distance(setup, output, adapter)
    assert logits <= 1e-4, f"logits of the saved adapter are {logits:.1e} away"
    name = str(dtype).removeprefix("torch.")
    return {"modules": len(pairs), "merges": len(steps), "formula": distance, "logits": logits, "dtype": name}


def _trained(model: nn.Module) -> str:
    """The one adapter with trainable factors."""
    adapters = {n.partition(".lora_A.")[2].partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    adapters |= {n.partition(".lora_embedding_A.")[2] for n, p in model.named_parameters() if p.requires_grad}
    (name,) = adapters - {""}
    return name


def check_journal(path: Path, steps: list[int], modules: set[str]) -> None:
    """Every step has its check and its merge, of every module."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert not [e for e in entries if e["kind"] == "error"], [e for e in entries if e["kind"] == "error"]
    for kind in ("check", "merge"):
        of_kind = [e for e in entries if e["kind"] == kind]
        assert [e["step"] for e in of_kind] == steps, f"{kind} entries at {[e['step'] for e in of_kind]}, not {steps}"
        for entry in of_kind:
            names = {m["name"] for m in entry["modules"]}
            assert names == modules, f"{kind} of other modules: {sorted(names ^ modules)}"


def check_untouched(witness: ModelWitness, factors: set[str]) -> None:
    """Between the two looks only factors of the trained adapter differ, and training goes on from what was merged."""
    steps = sorted(witness.before)
    assert len(steps) >= 3, f"only {len(steps)} steps"
    for step in steps:
        moved = set(changed(witness.before[step], witness.after[step]))
        assert moved, f"the callback changed nothing at step {step}"
        assert moved <= factors, f"changed besides the trained adapter: {sorted(moved - factors)[:3]}"
    later = set(changed(witness.after[steps[0]], witness.before[steps[1]]))
    assert later & factors, "the adapter did not train on after the merge"


def formula_distance(
    witness: ModelWitness,
    steps: list[int],
    pairs: dict[str, tuple[str, str]],
    model: nn.Module,
    adapter: str,
    base: Base,
    began: dict[str, Tensor],
) -> float:
    """Largest relative distance of a merged B·A from the dense formula's best of its rank.

    `began` holds the factors before training where they are a part of the base weight, which is not weighed.
    """
    scalings, safety = live_scalings(model, adapter), safety_updates(base)
    worst = 0.0
    for step in steps:
        before, after = witness.before[step], witness.after[step]
        for module, (A, B) in pairs.items():
            s = scalings[module]
            total = WEIGHTS[0] * dense(before[A], before[B], s) + WEIGHTS[1] * safety[module]
            total += (1 - WEIGHTS[0]) * dense(began[A], began[B], s) if began else 0.0
            expected = best_of_rank(total, before[A].shape[0])
            worst = max(worst, float((dense(after[A], after[B], s) - expected).norm() / expected.norm()))
    return worst


def live_scalings(model: nn.Module, adapter: str) -> dict[str, float]:
    """Module -> the scaling that PEFT holds."""
    from safemerge_callback.adapters.names import canonical_name

    layers = ((name, getattr(layer, "scaling", None)) for name, layer in model.named_modules())
    return {canonical_name(n): float(s[adapter]) for n, s in layers if isinstance(s, dict) and adapter in s}


def safety_updates(base: Base) -> dict[str, Tensor]:
    """Module -> dense update of the safety adapter, read from its file by PEFT's spelling; its scaling is 2."""
    from safetensors.torch import load_file

    tensors = load_file(base.folder / "safety" / "adapter_model.safetensors")
    spelled = {name.removesuffix(".weight") + ".safety": t for name, t in tensors.items()}
    return {m: dense(spelled[A], spelled[B], 2.0) for m, (A, B) in factor_names(spelled, "safety").items()}


@torch.no_grad()
def reload_distance(setup: Setup, output: Path, adapter: str) -> float:
    """Largest difference of logits between the trained model and its saved adapter, loaded by PEFT on a new base.

    AssertionError unless the loaded factors are the live ones, bit for bit, and the adapter matters to the logits.
    """
    from peft import PeftModel

    saved = output / "saved"
    setup.save(setup.trainer, str(saved))
    folder = saved if adapter == "default" else saved / adapter
    fresh: Any = PeftModel.from_pretrained(setup.base(), folder, adapter).eval()
    # Without the autocast that accelerate leaves around forward.
    unwrapped = setup.trainer.accelerator.unwrap_model(setup.trainer.model, False, keep_torch_compile=False)
    trained: Any = unwrapped.eval()
    trained.set_adapter(adapter)
    live = everything(trained)
    loaded = {n: p for n, p in fresh.named_parameters() if f".{adapter}" in n and "lora_" in n}
    for name, parameter in loaded.items():
        # PEFT widens factors that were trained in bf16.
        parameter.data = parameter.data.to(live[name].dtype)
    unlike = [name for name, parameter in loaded.items() if not same(parameter, live[name])]
    assert not unlike, f"saved factors differ from the live ones: {unlike[:3]}"
    logits_trained, again = logits(trained), logits(fresh)
    with fresh.disable_adapter():
        assert not torch.equal(logits_trained, logits(fresh)), "the trained adapter changes no logit"
    return float((logits_trained - again).abs().max())


def logits(model: Any) -> Tensor:
    """Logits on a fixed batch."""
    ids = torch.arange(9, 33, device=model.device).reshape(3, 8)
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits.float()
