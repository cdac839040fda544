"""What is said about the hours before the first cell."""

import pytest

from recipes.comparison import estimate as module
from recipes.comparison.estimate import estimate
from recipes.comparison.grid import make_grid


def said(monkeypatch, fast, bf16, dtype):
    monkeypatch.setattr(module, "fast_bfloat16", lambda: fast)
    raw = {"model": "org/aligned", "unaligned": "org/unaligned", "target_modules": ["q_proj"], "seeds": [1]}
    made = {**raw, "output_dir": "runs", "tasks": ["sentiment"], "arms": {"plain": {"about": "plain"}}}
    settings = {} if bf16 is None else {"bf16": bf16}
    return estimate(make_grid({**made, "finetune": settings, "evaluate": {"dtype": dtype}}), [])


@pytest.mark.parametrize(("bf16", "dtype"), [(True, "float32"), (False, "bfloat16"), (None, "float32")])
def test_bfloat16_without_instructions_for_it_is_said_to_be_slow(monkeypatch, bf16, dtype):
    assert "up to 20 times that in bfloat16" in said(monkeypatch, False, bf16, dtype)
    assert said(monkeypatch, True, bf16, dtype).endswith("in float32")


def test_nothing_is_said_of_a_grid_in_float32(monkeypatch):
    assert said(monkeypatch, False, False, "float32").endswith("in float32")
