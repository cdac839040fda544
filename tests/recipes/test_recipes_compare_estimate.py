"""What is said about the hours before the first cell."""

import pytest

from recipes.comparison import estimate as module
from recipes.comparison.estimate import estimate
from recipes.comparison.grid import make_grid


def said(monkeypatch, processor, bf16, dtype, device="cpu"):
    monkeypatch.setattr(module, "processor", lambda: processor)
    monkeypatch.setattr(module, "device", lambda: device)
    raw = {"model": "org/aligned", "unaligned": "org/unaligned", "target_modules": ["q_proj"], "seeds": [1]}
    made = {**raw, "output_dir": "runs", "tasks": ["sentiment"], "arms": {"plain": {"about": "plain"}}}
    settings = {} if bf16 is None else {"bf16": bf16}
    return estimate(make_grid({**made, "finetune": settings, "evaluate": {"dtype": dtype}}), [])


@pytest.mark.parametrize(("bf16", "dtype"), [(True, "float32"), (False, "bfloat16"), (None, "float32")])
def test_bfloat16_on_a_processor_without_it_is_said_to_be_slow(monkeypatch, bf16, dtype):
    assert "20 times that in bfloat16 on a processor that has AVX2 alone" in said(monkeypatch, "AVX2", bf16, dtype)


@pytest.mark.parametrize(
    ("processor", "bf16", "dtype", "device"),
    [
        ("AVX2", False, "float32", "cpu"),
        ("AVX512", True, "bfloat16", "cpu"),
        ("AVX2", True, "bfloat16", "NVIDIA H100"),
    ],
)
def test_nothing_is_said_where_there_is_nothing_to_wait_for(monkeypatch, processor, bf16, dtype, device):
    assert said(monkeypatch, processor, bf16, dtype, device).endswith("in float32")
