"""A quantised checkpoint is refused by that, first, whatever the format: by tensors' names, dtypes or config.json."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from safemerge_callback.errors import SubspaceError
from safemerge_callback.offline import BaseModel, merge_adapters
from safemerge_callback.subspace import CheckpointShards, build_subspace


def ints(*shape, dtype=torch.int32):
    return torch.zeros(*shape, dtype=dtype)


def fp8(w):
    return w.to(torch.float8_e4m3fn)


# Format -> what takes the place of `PATH.weight`, w of shape (out, in), as each library's release stores it.
PACKED = {
    "gptq": lambda k, w: {
        f"{k}.qweight": ints(w.shape[1] // 8, w.shape[0]), f"{k}.scales": torch.ones(1, w.shape[0]),
        f"{k}.qzeros": ints(1, w.shape[0] // 8), f"{k}.g_idx": ints(w.shape[1]),
    },
    "gptq or awq": lambda k, w: {
        f"{k}.qweight": ints(w.shape[1], w.shape[0] // 8), f"{k}.scales": torch.ones(1, w.shape[0]),
        f"{k}.qzeros": ints(1, w.shape[0] // 8),
    },
    "bitsandbytes 4-bit": lambda k, w: {
        f"{k}.weight": ints(w.numel() // 2, 1, dtype=torch.uint8), f"{k}.weight.absmax": torch.ones(8),
        f"{k}.weight.quant_map": torch.ones(16),
        f"{k}.weight.quant_state.bitsandbytes__nf4": ints(8, dtype=torch.uint8),
    },
    "bitsandbytes 8-bit": lambda k, w: {
        f"{k}.weight": w.to(torch.int8), f"{k}.SCB": torch.ones(w.shape[0]),
        f"{k}.weight_format": ints(1, dtype=torch.uint8)[0],
    },
    "compressed-tensors": lambda k, w: {
        f"{k}.weight_packed": ints(w.shape[0], w.shape[1] // 8), f"{k}.weight_scale": torch.ones(w.shape[0], 1),
        f"{k}.weight_shape": ints(2, dtype=torch.int64),
    },
    "fp8": lambda k, w: {f"{k}.weight": fp8(w), f"{k}.weight_scale_inv": torch.ones(1, 1)},
    "fp8 or compressed-tensors": lambda k, w: {f"{k}.weight": fp8(w), f"{k}.weight_scale": torch.ones(1)},
    "int8": lambda k, w: {f"{k}.weight": w.to(torch.int8)},
    "hqq": lambda k, w: {f"{k}.W_q": ints(w.numel() // 2, 1, dtype=torch.uint8), f"{k}.scale": torch.ones(8, 1)},
    "aqlm": lambda k, w: {
        f"{k}.codes": ints(w.shape[0], w.shape[1] // 8, 1, dtype=torch.int16),
        f"{k}.codebooks": torch.ones(1, 4, 1, 8), f"{k}.scales": torch.ones(w.shape[0], 1, 1, 1),
    },
    "quanto or torchao": lambda k, w: {f"{k}.weight._data": w.to(torch.int8), f"{k}.weight._scale": torch.ones(1)},
}  # fmt: skip
# quantization_config -> what it is called; the tensors are of no format that is known here.
CONFIGS = {
    "spqr": {"quant_method": "spqr", "bits": 3},
    "bitsandbytes 4-bit": {"load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
}


@pytest.fixture
def world(tmp_path, tiny_llama):
    for name, seed in (("base", 1), ("chat", 2)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
    return tmp_path


def packed(folder, pack, config=None, where="proj.weight"):
    """The folder's checkpoint as a library would have quantised it."""
    held = load_file(folder / "model.safetensors")
    tensors = {}
    for key, w in held.items():
        tensors.update(pack(key.removesuffix(".weight"), w) if key.endswith(where) else {key: w})
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        plain = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(plain | {"quantization_config": config}))
    return folder


def build(world, **knobs):
    parts = {"aligned": world / "chat", "unaligned": world / "base", "progress": False}
    return build_subspace(world / "v", **(parts | knobs))


@pytest.mark.parametrize("sides", [("chat",), ("base",), ("chat", "base")])
@pytest.mark.parametrize("how", PACKED)
def test_by_the_tensors_of_either_side_or_both(world, how, sides):
    for side in sides:
        packed(world / side, PACKED[how])
    with pytest.raises(SubspaceError) as refused:
        build(world)
    first = "chat" if "chat" in sides else "base"
    assert str(refused.value).startswith(
        f"checkpoint {first!r} is quantised ({how}): use the unquantised checkpoint. 14 of 14 modules are packed"
    )
    assert not (world / "v").exists()


@pytest.mark.parametrize("sides", [("chat",), ("chat", "base")])
@pytest.mark.parametrize("how", CONFIGS)
def test_by_the_configuration_where_the_tensors_are_unknown(world, how, sides):
    for side in sides:
        packed(world / side, lambda k, w: {f"{k}.dense_values": torch.ones(3)}, CONFIGS[how])
    with pytest.raises(SubspaceError, match=rf"checkpoint 'chat' is quantised \({how}\): use the unquantised"):
        build(world)


def test_the_configuration_names_what_the_tensors_leave_open(world):
    packed(world / "chat", PACKED["gptq or awq"], {"quant_method": "awq"})
    with pytest.raises(SubspaceError, match=r"is quantised \(awq\)"):
        build(world)
    with pytest.raises(SubspaceError, match=r"is quantised \(awq\)"):
        build(world, target_modules=["q_proj"])


def test_what_is_plain_is_built_whatever_lies_beside_it(world):
    """As gpt-oss: attention in bfloat16, experts in MXFP4, and a configuration that says so."""
    for side in ("chat", "base"):
        packed(
            world / side,
            lambda k, w: {
                f"{k.replace('.up_proj', '.experts.gate_up_proj')}_blocks": ints(2, 4, 4, dtype=torch.uint8),
                f"{k.replace('.up_proj', '.experts.gate_up_proj')}_scales": ints(2, 4, dtype=torch.uint8),
            },
            {"quant_method": "mxfp4"},
            where="up_proj.weight",
        )
    assert len(build(world).modules) == 12
    with pytest.raises(SubspaceError, match=r"is quantised \(mxfp4\).* first 'layers.0.mlp.experts.0.gate_up_proj'"):
        build(world, target_modules=["gate_up_proj"])


def test_a_configuration_without_packed_tensors_refuses_nothing(world):
    packed(world / "chat", lambda k, w: {f"{k}.weight": w, f"{k}.input_scale": torch.ones(1)}, CONFIGS["gptq"])
    assert len(build(world).modules) == 14


# Tensors of a plain model's own, beside no weight, under words that quantised ones use.
UNSAID: tuple[dict[str, str] | None, ...] = (None, {})
OWN = {
    "codes": torch.ones(4),
    "whole codes": ints(4),
    "indices": ints(4, dtype=torch.int64),
    "centroids": torch.ones(2, 2),
    "W_q": torch.ones(4, 4),
    "weight_scale": torch.ones(1),
    "input_scale": torch.ones(1),
    "absmax": torch.ones(1),
    "SCB": torch.ones(1),
}


@pytest.mark.parametrize(
    ("word", "config"),
    # Whole numbers under such a name, and a configuration that says so, are what they say.
    [(word, config) for word in OWN for config in UNSAID if not (config == {} and word in ("whole codes", "indices"))],
)
def test_a_plain_models_own_tensors_are_no_packed_weights(world, word, config):
    for side in ("chat", "base"):
        more = {f"model.layers.0.picker.{word.split()[-1]}": OWN[word]}
        packed(world / side, lambda k, w, more=more: {f"{k}.weight": w} | more, where="0.mlp.up_proj.weight")
        plain = json.loads((world / side / "config.json").read_text())
        (world / side / "config.json").write_text(json.dumps(plain | {"quantization_config": config}))
    assert len(build(world).modules) == 14


def test_beside_an_alignment_adapter_and_as_the_base_to_bake_into(world, tiny_llama):
    build(world)
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny_llama(seed=2), lora).save_pretrained(world / "task")
    packed(world / "chat", PACKED["gptq"])
    with pytest.raises(SubspaceError, match=r"checkpoint 'chat' is quantised \(gptq\)"):
        build_subspace(world / "w", alignment_adapter=world / "task", aligned=world / "chat", progress=False)
    with pytest.raises(SubspaceError, match=r"base model '.*chat' is quantised \(gptq\): use the unquantised"):
        merge_adapters(world / "task", None, world / "v", world / "out", gate="all", method="pull", bake=world / "chat")
    assert not (world / "out").exists()


def test_what_bitsandbytes_itself_saves(world):
    """A real file of the library, 4-bit on the CPU."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(world / "chat", quantization_config=how).save_pretrained(world / "small")
    with pytest.raises(SubspaceError, match=r"'small' is quantised \(bitsandbytes 4-bit\)"):
        build(world, aligned=world / "small")
    with pytest.raises(SubspaceError, match="is quantised"):
        CheckpointShards.open(world / "small").read("layers.0.mlp.up_proj")
    assert BaseModel.find(world / "small")
