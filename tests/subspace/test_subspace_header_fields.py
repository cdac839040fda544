"""A header field of another type, or no number, is refused where the file is opened."""

import hashlib
import json
import math
import struct

import pytest
import torch

from safemerge_callback.errors import SubspaceError
from safemerge_callback.subspace import Subspace, build_subspace
from safemerge_callback.subspace.header import FILE_FIELDS, MODULE_FIELDS, FileHeader, ModuleHeader

WRONG = {
    "shape": [None, [8], [8, 8.0], [8, True], [-8, 8], ["8", 8], {"8": 8}],
    "kind": [None, "thin", ["dense"], 1],
    "rank": ["4", 0, -1, 2.5, True, 10**400],
    "dtype": [None, "float", ["float32"], 32],
    "norm": [None, 0, -1.0, "x", True, math.nan, math.inf, 10**400, [1.0]],
    "null_cosine": [None, "0.5", -0.1, 1.5, math.nan, False],
    "null_std": [None, [0.1], {"4": None}, {"4": math.inf}, {"4": -0.1}, {"four": 0.1}, {"0": 0.1}],
    "energy": [None, 0.5, {"4": "0.5"}, {"4": 2.0}, {"-1": 0.5}],
    "error": [None, "0", -1.0, math.nan],
    "checksums": [None, ["x"], {"a.V": 7}],
    "cross": [None, "0", math.inf],
}
WRONG_FILE = {
    "aligned": [None, "x", []],
    "unaligned": [None, 3],
    "modules": [None, [], {"a": None}, {"a": [1]}],
    "unmoved": [None, "a", {"a": 1}, [1]],
    "probed": [None, "a", [None], ["stranger"]],
    "exact": [None, "x", {"file": "x"}, {"file": 1, "sha256": "x"}],
    "checksums": [None, {"probes": None}],
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fields")
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    for name in ("aligned", "unaligned"):
        torch.manual_seed(len(name))
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
    path = folder / "s.safetensors"
    build_subspace(path, aligned=folder / "aligned", unaligned=folder / "unaligned", progress=False)
    return path.read_bytes()


def changed(raw, edit):
    """The file with its header edited and signed anew, as another writer of the format would."""
    (length,) = struct.unpack("<Q", raw[:8])
    outer = json.loads(raw[8 : 8 + length])
    inner = json.loads(outer["__metadata__"]["header"])
    edit(inner)
    text = json.dumps(inner)
    outer["__metadata__"] |= {"header": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    header = json.dumps(outer).encode()
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def test_every_field_has_a_rule():
    assert MODULE_FIELDS.keys() == ModuleHeader.__dataclass_fields__.keys() == WRONG.keys()
    assert FILE_FIELDS.keys() == FileHeader.__dataclass_fields__.keys() == WRONG_FILE.keys()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_of_a_module_is_named(raw, tmp_path, name):
    path = tmp_path / "s.safetensors"
    for value in WRONG[name]:
        path.write_bytes(changed(raw, lambda inner, v=value: next(iter(inner["modules"].values())).update({name: v})))
        with pytest.raises(SubspaceError, match=rf"corrupt header.*{name} of module .*allowed are"):
            Subspace.load(path)


@pytest.mark.parametrize("name", WRONG_FILE)
def test_a_wrong_field_of_the_file_is_named(raw, tmp_path, name):
    path = tmp_path / "s.safetensors"
    for value in WRONG_FILE[name]:
        path.write_bytes(changed(raw, lambda inner, v=value: inner.update({name: v})))
        with pytest.raises(SubspaceError, match=rf"corrupt header.*{name}"):
            Subspace.load(path)


def test_a_field_that_is_lacking_or_unknown_is_refused_and_the_file_as_it_was_is_read(raw, tmp_path):
    path = tmp_path / "s.safetensors"
    for edit in (lambda inner: inner.pop("probed"), lambda inner: next(iter(inner["modules"].values())).pop("norm")):
        path.write_bytes(changed(raw, edit))
        with pytest.raises(SubspaceError, match="corrupt header"):
            Subspace.load(path)
    path.write_bytes(changed(raw, lambda inner: None))
    assert len(Subspace.load(path).modules) == 7
