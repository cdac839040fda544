"""Every grid of the repository is read by the command that it names, and counted; the old names of commands work."""

import re
import runpy
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from method_comparison import resolve
from method_comparison.grid import cells_of, load_grid
from method_comparison.resolve import check_cells
from recipes.arguments import PREFIX
from recipes.settings import read_settings
from recipes.train_safety_adapter import parse_train
from tests.support.ranks import started

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
FILES = sorted((ROOT / "method_comparison" / "grids").glob("*.yaml"))
# transformers 5.23 calls it activation_checkpointing; trl 1.x, and earlier transformers, know the old name alone
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def test_every_file_among_the_grids_is_one():
    assert len(FILES) == 10
    assert sorted((ROOT / "method_comparison" / "grids").rglob("*.*")) == FILES


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_first_line_is_the_command_that_runs_the_grid(path):
    text = path.read_text()
    assert text.splitlines()[0] == f"# python -m method_comparison.compare --config {path.relative_to(ROOT)}"
    mentioned = re.findall(r"(?:configs|recipes|method_comparison)/[\w./]*\w", text)
    assert [name for name in mentioned if not (ROOT / name).exists()] == []


def on_cpu(path):
    """The file as it is, but for what only a GPU can do."""
    return ["--config", str(path), "--bf16", "false", "--use_cpu", "true"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_grid_can_run(path, monkeypatch):
    # What a packaged model's checkpoint says is not asked here: it would be unpacked for that.
    monkeypatch.setattr(resolve, "_read_config", lambda model: None)
    if path.stem.startswith(("smollm2_full_rank", "smollm2_defences")):
        # Not shipped: they are trained on the spot.
        made = {parse_train(on_cpu(file))[1].output_dir for file in (CONFIGS / "train_safety_adapter").glob("*.yaml")}
        monkeypatch.setattr(
            resolve, "_read_adapter", lambda name: name in made or pytest.fail(f"{name} is made nowhere")
        )
    grid = load_grid(path)
    cells = cells_of(grid)
    check_cells(replace(grid, finetune={**grid.finetune, "use_cpu": True}), cells)
    assert {cell.arm.name for cell in cells} == set(grid.arms)
    assert all(arm.about for arm in grid.arms.values())
    if path.stem == "smollm2":
        benign, poisoned = (
            Counter(cell.arm.name for cell in cells if (cell.task, cell.poisoned_share) == ("sentiment", share))
            for share in (0.0, 0.1)
        )
        assert sum(number >= 5 for number in benign.values()) >= 6
        assert {name for name, number in benign.items() if number < 2} == {"aligned", "demo", "demo_plain"}
        assert {name for name, number in poisoned.items() if number < 2} == {"probed_plain", "probed_every_10"}
        # The demo is a row of it.
        guarded = read_settings(CONFIGS / "finetune" / "smollm2_sentiment_safemerge.yaml", "config file")
        demo = next(resolve.resolved(grid, cell) for cell in cells if cell.arm.name == "demo")
        own = {"output_dir", "bf16", f"{PREFIX}subspace", f"{PREFIX}at_train_end"}
        assert {key: demo.get(key) for key in guarded if key not in own} == {
            key: value for key, value in guarded.items() if key not in own
        }


def run_by_its_old_name(name, *words):
    """What a process runs: `python -m recipes.NAME WORD...`, with every warning shown."""
    warnings.simplefilter("default")
    sys.argv = [name, *words]
    runpy.run_module(f"recipes.{name}", run_name="__main__", alter_sys=True)


@pytest.mark.parametrize("name", ["compare", "drift", "label_responses", "judge_accuracy"])
def test_the_old_name_of_a_command_runs_the_new_one_and_warns(name):
    words = ["--config", "configs/compare/absent.yaml", "--sheet", "absent.csv"]
    with started(1, run_by_its_old_name, name, *words[: None if name == "label_responses" else 2]) as (run,):
        run.wait(120)
        said = run.said()
    assert f"recipes.{name} is now method_comparison.{name}: call that" in said
    assert ("71.0%" if name == "judge_accuracy" else "'method_comparison/grids/absent.yaml'") in said
