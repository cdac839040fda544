import json

import pytest
import torch
from safetensors.torch import save_file

from safemerge_callback.errors import SubspaceError
from safemerge_callback.io.addresses import source_name
from safemerge_callback.subspace import CheckpointShards
from safemerge_callback.subspace.checkpoints.locate import locate


def test_a_snapshot_in_the_hub_cache_is_named_after_its_model(tmp_path):
    folder = tmp_path / "models--some-org--some-model" / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    save_file({"layers.0.q_proj.weight": torch.zeros(2, 3)}, folder / "model.safetensors")
    fingerprint = CheckpointShards.open(folder).fingerprint()
    assert (fingerprint["source"], fingerprint["revision"]) == ("some-org/some-model", "0123abc")


def test_source_name_keeps_hub_ids_and_drops_folders(tmp_path):
    assert source_name("org/model") == "org/model"
    assert source_name("org/model@v1.0") == "org/model@v1.0"
    assert source_name(tmp_path) == tmp_path.name
    assert source_name("/gone/away/model") == "model"


def test_a_folder_wins_over_a_hub_id_of_the_same_spelling(tmp_path, monkeypatch):
    for folder in ("org/name", "org/name@main"):
        (tmp_path / folder).mkdir(parents=True)
        save_file({"layers.0.q_proj.weight": torch.zeros(2, 3)}, tmp_path / folder / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert (locate("org/name").name, locate("org/name@main").name) == ("name", "name@main")


@pytest.mark.parametrize("config", ['{"model_type": "phimoe"}', '{"model_type": 3}', "[]", None])
def test_the_architecture_is_what_config_json_says_if_it_says_one(tmp_path, config):
    save_file({"layers.0.q_proj.weight": torch.zeros(2, 3)}, tmp_path / "some.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    expected = "phimoe" if config and "phimoe" in config else None
    assert locate(tmp_path).architecture == expected
    assert locate(tmp_path / "some.safetensors").architecture == expected


@pytest.mark.parametrize(("config", "words"), [("{", "is no JSON"), ("[" * 100_000, "too deep")])
def test_a_config_json_that_cannot_be_read_is_refused(tmp_path, config, words):
    save_file({"layers.0.q_proj.weight": torch.zeros(2, 3)}, tmp_path / "some.safetensors")
    (tmp_path / "config.json").write_text(config)
    for source in (tmp_path, tmp_path / "some.safetensors"):
        with pytest.raises(SubspaceError, match=f"config.json .*{words}.*Download it again"):
            locate(source)


@pytest.mark.parametrize("listed", [["model.safetensors"], {"a.weight": 3}, {"a.weight": "a.bin"}, {}])
def test_an_index_that_is_none_is_refused(tmp_path, listed):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(SubspaceError, match=r"index\.json"):
        locate(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.gguf", "consolidated.pth"])
def test_pickle_and_gguf_are_never_read(tmp_path, file):
    (tmp_path / file).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(SubspaceError, match=rf"only {file}: pickle and GGUF"):
        CheckpointShards.open(tmp_path)
    with pytest.raises(SubspaceError, match=r"only \.safetensors is read"):
        CheckpointShards.open(tmp_path / file)


def test_an_adapter_folder_is_recognised(tmp_path):
    save_file({"x.lora_A.weight": torch.zeros(2, 3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SubspaceError, match="pass it as alignment_adapter"):
        CheckpointShards.open(tmp_path)


def test_a_place_that_is_nowhere(tmp_path):
    with pytest.raises(SubspaceError, match="no such folder or file"):
        CheckpointShards.open(tmp_path / "nowhere")
    with pytest.raises(SubspaceError, match="'no-such-org/no-such-model' is no folder here and could not be fetched"):
        CheckpointShards.open("no-such-org/no-such-model")
