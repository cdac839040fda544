import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from safemerge_callback.errors import SubspaceError
from safemerge_callback.subspace.stream import SafetensorsStream, reserve_for


@pytest.fixture
def tensors():
    return {
        "a": torch.randn(5, 7).bfloat16(),  # 70 bytes: what follows must be aligned all the same
        "b": torch.randn(3, 3),
        "c": torch.randn(4, 5, dtype=torch.float64),
        "d": torch.randn(3000, 2000),  # more than one block
        "e": torch.arange(3),
        "f": torch.randn(2, 3).half(),
    }


def write(path, tensors, metadata, reserve=None, interrupt=False):
    with SafetensorsStream(path, reserve or reserve_for(metadata, tensors)) as stream:
        for name, tensor in tensors.items():
            stream.append(name, tensor)
        if interrupt:
            beside = {f".{path.name}.partial", f".{path.name}.lock"}
            assert {p.name for p in path.parent.iterdir()} == {path.name, *beside}
            raise KeyboardInterrupt
        stream.finish(metadata)


def test_plain_safetensors_reads_back_every_byte(tmp_path, tensors):
    path = tmp_path / "new folder" / "x.safetensors"
    write(path, tensors, {"note": 'quotes " and ü'})
    found = load_file(path)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert {name for name in found if name not in tensors} == {"padding.70", "padding.108"}
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"note": 'quotes " and ü'}


def test_a_cast_is_done_on_the_way(tmp_path):
    with SafetensorsStream(tmp_path / "x", 1000) as stream:
        stream.append("t", torch.arange(6.0).reshape(2, 3).mT, torch.bfloat16)
        stream.finish({})
    assert torch.equal(load_file(tmp_path / "x")["t"], torch.arange(6.0).reshape(2, 3).mT.bfloat16())


def test_an_exception_leaves_nothing_and_the_old_file_as_it_was(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    path.write_text("old safemerge.subspace")
    with pytest.raises(KeyboardInterrupt):
        write(path, tensors, {}, interrupt=True)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old safemerge.subspace"


def test_a_header_that_outgrows_its_space_is_an_error_not_a_broken_file(tmp_path, tensors):
    with pytest.raises(SubspaceError, match="longer than the 16 reserved"):
        write(tmp_path / "x", tensors, {}, reserve=16)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(SubspaceError, match="is a folder"), SafetensorsStream(tmp_path, 16):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(SubspaceError, match="cannot be written"), SafetensorsStream(tmp_path / "file" / "x", 16):
        pass
