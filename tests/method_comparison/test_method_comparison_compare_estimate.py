"""What is said about the hours before the first cell."""

import pytest

from method_comparison import compare as module
from method_comparison.compare import estimate
from method_comparison.grid import cells_of, make_grid
from recipes.processor import ProcessorPace

SLOW, QUICK = ProcessorPace("an EPYC", 124.0, 82.0), ProcessorPace("a GPU", 10.0, 100.0)


def said(monkeypatch, pace, bf16, dtype, nothing=False):
    monkeypatch.setattr(module, "measured_pace", lambda: pace)
    monkeypatch.setattr(module, "seconds_of", lambda grid, cell: (60.0, 120.0))
    raw = {"model": "org/aligned", "unaligned": "org/unaligned", "target_modules": ["q_proj"], "seeds": [1]}
    made = {**raw, "output_dir": "runs", "tasks": ["sentiment"], "arms": {"plain": {"about": "plain"}}}
    settings = {} if bf16 is None else {"bf16": bf16}
    grid = make_grid({**made, "finetune": settings, "evaluate": {"dtype": dtype}})
    return estimate(grid, [] if nothing else cells_of(grid))


@pytest.mark.parametrize(("bf16", "dtype"), [(True, "float32"), (False, "bfloat16"), (None, "float32")])
def test_bfloat16_that_was_measured_to_be_slower_is_said_to_be(monkeypatch, bf16, dtype):
    told = said(monkeypatch, SLOW, bf16, dtype)
    assert "longer in bfloat16 (bfloat16 at 0.66 times the pace of float32 on an EPYC, measured)" in told
    assert said(monkeypatch, QUICK, bf16, dtype).endswith("in float32")


def test_nothing_is_said_of_a_grid_in_float32_or_one_that_is_done(monkeypatch):
    assert said(monkeypatch, SLOW, False, "float32").endswith(
        "about 1.0 to 2.0 minutes at the pace of a 135M model on 2 CPU cores in float32"
    )
    assert said(monkeypatch, SLOW, True, "bfloat16", nothing=True).endswith("in float32")
