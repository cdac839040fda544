"""A tiny model of each family with random LoRA factors, its two checkpoints, and their subspace."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from safemerge_callback.adapters import canonical_name, load_adapter
from safemerge_callback.subspace import Subspace, build_subspace

LLAMA_LIKE = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def with_lora(model, targets, rank=4, alpha=8, **lora):
    """`model` as a PeftModel whose factors are random, B too."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        # peft advises on saving when an embedding that is tied to the head is adapted
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        peft_model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **lora))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return peft_model


def wide(parameter):
    return parameter.detach().double()


def lora_layers(model):
    return {canonical_name(n): m for n, m in model.named_modules() if hasattr(m, "lora_A") and len(m.scaling)}


def update(layer, adapter="default"):
    """s·B·A in map orientation, float64, from PEFT's own dense update."""
    delta = layer.get_delta_weight(adapter).detach().double()
    flipped = getattr(layer, "fan_in_fan_out", False) or adapter in layer.lora_embedding_A
    return delta.T if flipped else delta


class Case(NamedTuple):
    """`model` (PEFT, random factors), `V` (dense, float64, map orientation), `subspace`, and how to make it again."""

    model: torch.nn.Module
    V: dict
    subspace: Subspace
    factory: Callable
    targets: list

    def updates(self, adapter="default"):
        """Canonical name -> s·B·A in map orientation, float64."""
        return {name: update(layer, adapter) for name, layer in lora_layers(self.model).items()}

    def snapshot(self):
        """Every LoRA parameter, copied."""
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if "lora_" in n}

    def changed(self, before):
        """The modules of which any factor is not what it was, to the bit."""
        return {canonical_name(n) for n, p in self.snapshot().items() if not torch.equal(p, before[n])}


@pytest.fixture
def make_case(tmp_path, request):
    """A factory: (model, V, subspace, safety) of one family; V is dense, float64, in map orientation."""

    def make(family, targets=LLAMA_LIKE, equal=(), **lora):
        factory = request.getfixturevalue(f"tiny_{family}") if family != "gpt2" else tiny_gpt2
        aligned, unaligned = factory(seed=1), factory(seed=1)
        with torch.no_grad():
            for name, parameter in unaligned.named_parameters():
                if canonical_name(name) not in equal:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        for name, model in (("aligned", aligned), ("unaligned", unaligned)):
            model.save_pretrained(tmp_path / name)
        subspace = build_subspace(
            tmp_path / "subspace.safetensors",
            aligned=tmp_path / "aligned",
            unaligned=tmp_path / "unaligned",
            target_modules=targets,
            progress=False,
        )
        weights = dict(unaligned.named_parameters())
        V = {canonical_name(n): wide(p) - wide(weights[n]) for n, p in aligned.named_parameters()}
        model = with_lora(aligned, targets, **lora)
        for name, layer in lora_layers(model).items():
            if V[name].shape != update(layer).shape:
                V[name] = V[name].T
        return Case(model, V, subspace, factory, targets)

    return make


@pytest.fixture
def safety_for(tmp_path):
    """A factory: another random adapter for the same base, saved by PEFT and loaded without a model."""

    def make(case, targets=None, rank=4, alpha=8, **lora):
        model = with_lora(case.factory(seed=1), targets or case.targets, rank, alpha, **lora)
        with warnings.catch_warnings():
            # peft tells that it saves an adapted embedding's base weight as well
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
            model.save_pretrained(tmp_path / "safety")
        return load_adapter(tmp_path / "safety"), {n: update(layer) for n, layer in lora_layers(model).items()}

    return make


def tiny_gpt2(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


class HostWaits(torch.overrides.TorchFunctionMode):
    """Counts calls that would make the host wait for a device, as if tensors were on one."""

    WAITS = (
        torch.Tensor.tolist,
        torch.Tensor.item,
        torch.Tensor.cpu,
        torch.Tensor.numpy,
        torch.Tensor.__bool__,
        torch.Tensor.__float__,
        torch.Tensor.__int__,
        torch.Tensor.__index__,
        torch.Tensor.nonzero,
        torch.Tensor.is_nonzero,
        torch.Tensor.equal,
        torch.equal,
        torch.allclose,
        torch.nonzero,
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if any(func is wait for wait in self.WAITS):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def host_waits():
    return HostWaits()
