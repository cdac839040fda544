"""Checkpoints that cannot be used, or only when asked: each is one sentence, and leaves no file."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import save_file

from safemerge_callback.errors import ConfigError, SubspaceError
from safemerge_callback.subspace import build_subspace
from tests.support.terminal import Terminal


def save(folder, rows=20, seed=0, **more):
    """A sharded checkpoint with one linear layer a shard and an embedding of so many rows."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    embedding = torch.randn(30, 8, generator=generator)[:rows]
    shards = [{f"model.layers.{i}.a.weight": torch.randn(6, 8, generator=generator)} for i in range(2)]
    shards[0]["model.embed_tokens.weight"] = embedding.clone()
    shards[0].update(more)
    for number, tensors in enumerate(shards):
        save_file(tensors, folder / f"model-{number}.safetensors")
    weight_map = {key: f"model-{number}.safetensors" for number, tensors in enumerate(shards) for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return embedding


def build(tmp_path, **knobs):
    knobs = {"aligned": tmp_path / "aligned", "unaligned": tmp_path / "unaligned", "progress": False, **knobs}
    return build_subspace(tmp_path / "v", **knobs)


def refused(tmp_path, says, **knobs):
    with pytest.raises(SubspaceError, match=says):
        build(tmp_path, **knobs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned", "unaligned"]


def test_a_truncated_shard(tmp_path):
    save(tmp_path / "aligned")
    save(tmp_path / "unaligned", seed=1)
    shard = tmp_path / "unaligned" / "model-1.safetensors"
    os.truncate(shard, shard.stat().st_size - 4)
    refused(tmp_path, r"unaligned/model-1\.safetensors' is not a readable safetensors file: corrupt, cut short")


def test_a_missing_shard_and_a_missing_index(tmp_path):
    save(tmp_path / "aligned")
    save(tmp_path / "unaligned", seed=1)
    (tmp_path / "unaligned" / "model-1.safetensors").unlink()
    refused(tmp_path, r"1 of 2 shards are missing, first 'model-1\.safetensors'")
    (tmp_path / "aligned" / "model.safetensors.index.json").unlink()
    refused(tmp_path, r"2 safetensors files but no model\.safetensors\.index\.json")


def test_vocabularies_of_different_height_are_refused_unless_common_rows_are_asked_for(tmp_path):
    save(tmp_path / "aligned", rows=20)
    save(tmp_path / "unaligned", rows=25, seed=1)
    says = r"'embed_tokens' is \(20, 8\) in 'aligned' but \(25, 8\) in 'unaligned'\. .*--common-rows"
    refused(tmp_path, says, target_modules=["embed_tokens"])
    assert set(build(tmp_path).modules) == {"layers.0.a", "layers.1.a"}


@pytest.mark.parametrize(("rows", "other_rows"), [(20, 25), (25, 20), (20, 20)])
def test_common_rows_are_subtracted_and_v_has_the_aligned_height(tmp_path, rows, other_rows):
    aligned = save(tmp_path / "aligned", rows)
    unaligned = save(tmp_path / "unaligned", other_rows, seed=1)
    subspace = build(tmp_path, target_modules=["embed_tokens", "a"], common_rows=True)
    V = subspace.stack(["embed_tokens"])[0]
    common = min(rows, other_rows)
    assert subspace.modules["embed_tokens"].shape == (rows, 8)
    assert torch.equal(V[:common], aligned[:common] - unaligned[:common])
    assert not V[common:].any()
    assert subspace.modules["embed_tokens"].norm == pytest.approx(float(V.double().norm()))


def test_common_rows_are_for_vocabularies_alone(tmp_path):
    save(tmp_path / "aligned", **{"model.layers.5.b.weight": torch.ones(4, 8), "lm_head.weight": torch.ones(9, 8)})
    save(tmp_path / "unaligned", **{"model.layers.5.b.weight": torch.ones(5, 8), "lm_head.weight": torch.ones(9, 7)})
    says = (
        r"'layers\.5\.b' is \(4, 8\) in 'aligned' but \(5, 8\) in 'unaligned'\. Both checkpoints must be of one model"
    )
    refused(tmp_path, says, common_rows=True)
    refused(tmp_path, r"'lm_head' is \(9, 8\) .* must be of one model", target_modules=["lm_head"], common_rows=True)
    with pytest.raises(ConfigError, match="common_rows is for two checkpoints"):
        build_subspace(tmp_path / "v", alignment_adapter="x", common_rows=True)


def test_one_checkpoint_against_itself(tmp_path):
    save(tmp_path / "aligned")
    save(tmp_path / "unaligned")
    refused(tmp_path, r"aligned and unaligned are equal at all 2 modules, first 'layers\.0\.a'")


def test_the_bar_counts_bytes_and_time_on_stderr_and_can_be_silent(tmp_path, capsys, monkeypatch):
    save(tmp_path / "aligned")
    save(tmp_path / "unaligned", seed=1)
    build(tmp_path, progress=True)
    # Into a file, where nobody watches.
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    # Wide enough that no column wraps.
    monkeypatch.setenv("COLUMNS", "120")
    build(tmp_path, progress=True)
    assert capsys.readouterr().out == ""
    # 2 modules of 6 x 8 float32 from 2 checkpoints.
    assert "768/768 bytes" in terminal.getvalue()
    assert "building subspace" in terminal.getvalue()
    drawn = terminal.getvalue()
    build(tmp_path)
    assert (capsys.readouterr(), terminal.getvalue()) == (("", ""), drawn)
