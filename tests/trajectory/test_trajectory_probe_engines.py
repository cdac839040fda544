"""A probe under every engine, with two processes: bit-identical to absence, and each rank answers a share."""

import importlib.util
import json

import pytest
import torch

from tests.support.ranks import run_on
from tests.trajectory.engines import probe

# What must equal what, to the bit. What a probe did at a step without a merge would be seen at step 1 of `both`.
PAIRS = {"both": "guarded", "undone": "plain"}
TORCH = ("ddp", "fsdp1", "fsdp2")
DEEPSPEED = ("zero2", "zero3")


def train(world, out, tokenizer, engines, processes, kinds):
    """Every kind of training on every engine, in so many processes."""
    jobs = [f"{engine}:fp32:{kind}" for engine in engines for kind in kinds]
    run_on(processes, probe.main, world.folder, tokenizer, out, *jobs)


def read(out, engine, kind, rank=0):
    return torch.load(out / f"{engine}-fp32-{kind}-rank{rank}.pt")


def same_bits(left, right):
    assert left["losses"] == right["losses"]
    assert len(left["losses"]) == 4
    return left["steps"].keys() == right["steps"].keys() and all(
        torch.equal(x, y)
        for step, modules in left["steps"].items()
        for name, pair in modules.items()
        for x, y in zip(pair, right["steps"][step][name], strict=True)
    )


def probes(out, engine, kind):
    lines = (out / f"{engine}:fp32:{kind}" / "safemerge.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["kind"] in ("probe", "error", "rollback")]


@pytest.mark.parametrize("engines", [TORCH, DEEPSPEED], ids=["torch", "deepspeed"])
def test_a_probe_is_neutral_under_every_engine(world, tmp_path, chat_tokenizer, engines):
    if engines is DEEPSPEED and not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed: pip install 'safemerge-callback[engines]'")
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    train(world, tmp_path, tmp_path / "tokenizer", ("single",), 1, ("both",))
    train(world, tmp_path, tmp_path / "tokenizer", engines, 2, ("plain", "guarded", *PAIRS))
    for engine in engines:
        for kind, other in PAIRS.items():
            for rank in (0, 1):
                assert same_bits(read(tmp_path, engine, kind, rank), read(tmp_path, engine, other, rank)), (kind, rank)
        assert not torch.equal(
            *(read(tmp_path, engine, kind)["steps"][4]["layers.0.self_attn.q_proj"][1] for kind in ("plain", "guarded"))
        )
        seen = [(e["kind"], e.get("when"), e["step"]) for e in probes(tmp_path, engine, "both")]
        assert [when for _, when, _ in seen].count("before") == 2
        assert {kind for kind, _, _ in seen} == {"probe"}
        assert [e["kind"] for e in probes(tmp_path, engine, "undone")].count("rollback") == 2
        # Weights that are the same on every engine: what two processes share out is what one answers.
        first, alone = (probes(tmp_path, which, "both")[0] for which in (engine, "single"))
        assert first["measures"] == alone["measures"]
        assert first["mean_tokens"] == alone["mean_tokens"]
