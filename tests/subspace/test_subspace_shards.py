import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from safemerge_callback.errors import SubspaceError
from safemerge_callback.subspace import CheckpointShards


@pytest.fixture
def sharded(tiny_llama, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    return model, tmp_path / "llama"


def linear_weights(model):
    return {n.removeprefix("model."): m.weight.detach() for n, m in model.named_modules() if hasattr(m, "in_features")}


def test_every_linear_weight_of_a_sharded_checkpoint_is_read_by_name(sharded):
    model, folder = sharded
    shards = CheckpointShards.open(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    for name, weight in linear_weights(model).items():
        assert shards.shape(name) == tuple(weight.shape)
        assert shards.dtype(name) == "F32"
        assert torch.equal(shards.read(name), weight)
    assert torch.equal(shards.read("embed_tokens"), model.model.embed_tokens.weight)
    assert not any("norm" in name for name in shards.names)


def test_one_file_may_be_given_itself(tmp_path):
    weight = torch.randn(3, 5, dtype=torch.bfloat16)
    save_file({"model.layers.0.mlp.up_proj.weight": weight}, tmp_path / "some.safetensors")
    for source in (tmp_path / "some.safetensors", tmp_path):
        assert torch.equal(CheckpointShards.open(source).read("layers.0.mlp.up_proj"), weight)


def test_tied_head_is_the_embedding(tiny_gemma, tmp_path):
    model = tiny_gemma()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(CheckpointShards.open(tmp_path).read("lm_head"), model.lm_head.weight)


def test_a_head_is_not_guessed_where_there_are_two_embeddings(tmp_path):
    keys = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"]
    save_file({key: torch.zeros(4, 3) for key in keys}, tmp_path / "model.safetensors")
    assert "lm_head" not in CheckpointShards.open(tmp_path).names


def test_fingerprint_has_no_machine_path_and_sees_the_headers(sharded, tmp_path):
    _, folder = sharded
    first = CheckpointShards.open(folder).fingerprint()
    assert first["source"] == "llama"
    assert str(tmp_path) not in json.dumps(first)
    files = sorted(folder.glob("*.safetensors"))
    assert first["files"] == [path.name for path in files]
    assert first["sizes"] == [path.stat().st_size for path in files]
    shutil.copytree(folder, tmp_path / "copy")
    assert CheckpointShards.open(tmp_path / "copy").fingerprint()["header_sha256"] == first["header_sha256"]
    save_file({"layers.0.mlp.up_proj.weight": torch.zeros(2, 3)}, tmp_path / "other.safetensors")
    assert (
        CheckpointShards.open(tmp_path / "other.safetensors").fingerprint()["header_sha256"] != first["header_sha256"]
    )


def break_missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def break_cut_short(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def break_header(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"x" * 300)


def break_lfs_pointer(folder):
    (folder / "model-00002-of-00003.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")


def break_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")


def break_index_path(folder):
    index = {"weight_map": {"a.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def break_no_index(folder):
    (folder / "model.safetensors.index.json").unlink()


def break_two_names(folder):
    there = load_file(folder / "model-00002-of-00003.safetensors")
    save_file(there | {"layers.2.q_proj.weight": torch.zeros(2, 3)}, folder / "model-00002-of-00003.safetensors")


def break_key_in_two_files(folder):
    there = load_file(folder / "model-00002-of-00003.safetensors")
    both = there | load_file(folder / "model-00001-of-00003.safetensors")
    save_file(both, folder / "model-00002-of-00003.safetensors")


def break_tensor_lacking(folder):
    save_file({"other.weight": torch.zeros(2, 3)}, folder / "model-00002-of-00003.safetensors")


@pytest.mark.parametrize(
    ("damage", "names_it"),
    [
        (break_missing_shard, "1 of 3 shards are missing, first 'model-00002"),
        (break_cut_short, r"model-00002-of-00003\.safetensors' is not a readable"),
        (break_header, r"model-00002-of-00003\.safetensors' is not a readable"),
        (break_lfs_pointer, "Git LFS pointer"),
        (break_index, "index.json is corrupt"),
        (break_index_path, "elsewhere"),
        (break_no_index, "3 safetensors files but no"),
        (
            break_two_names,
            "'layers.2.q_proj.weight' and 'model.layers.2.q_proj.weight' are both module 'layers.2.q_proj'",
        ),
        (break_key_in_two_files, "'model.layers.1.q_proj.weight' is both in 'model-00001-of-00003.safetensors' and"),
        (break_tensor_lacking, "1 of 3 tensors that the index lists are not .* first 'model.layers.2.q_proj.weight'"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_what_is_wrong(tmp_path, damage, names_it):
    weight_map = {}
    for i in range(1, 4):
        file = f"model-{i:05}-of-00003.safetensors"
        save_file({f"model.layers.{i}.q_proj.weight": torch.randn(4, 4)}, tmp_path / file)
        weight_map[f"model.layers.{i}.q_proj.weight"] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    CheckpointShards.open(tmp_path)
    damage(tmp_path)
    with pytest.raises(SubspaceError, match=names_it):
        CheckpointShards.open(tmp_path)


def test_a_quantised_weight_is_refused_by_its_dtype(tmp_path):
    save_file({"layers.0.q_proj.weight": torch.zeros(4, 4, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(SubspaceError, match=r"is quantised \(packed as U8\)"):
        CheckpointShards.open(tmp_path).read("layers.0.q_proj")


def test_an_unknown_name_suggests_the_nearest(tmp_path):
    save_file({"layers.0.q_proj.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(SubspaceError, match=r"did you mean 'layers\.0\.q_proj'"):
        CheckpointShards.open(tmp_path).read("layers.0.q_projj")
