"""A YAML is the whole experiment: every file under configs/merge runs, and what a merge writes makes it again."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from safemerge_callback.cli import app
from safemerge_callback.errors import ConfigError
from safemerge_callback.methods import METHODS, get_method
from safemerge_callback.methods.aliases import COMBINATION_TYPES
from safemerge_callback.offline import merge_adapters
from safemerge_callback.offline.merge_yaml import keys, read_recipe

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "merge").glob("*.yaml"))
OFFLINE = {name for name, method in METHODS.items() if not method.needs & {"average", "grams"}}
WEIGHTS = "adapter_model.safetensors"


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def test_there_is_one_file_a_method_that_works_on_files():
    assert {path.stem for path in CONFIGS} == OFFLINE
    assert len(CONFIGS) == 13


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_file_runs_and_what_it_wrote_makes_it_again(here, path):
    assert yaml.safe_load(path.read_text())["method"] == path.stem
    safety = [] if path.stem == "project" else ["safety"]
    # The tiny adapters have six modules, and cosines above the paper's threshold.
    gate = ["--num-layers", 4]
    run("merge", "task", *safety, "-s", "s.safetensors", "--config", path, *gate, "-o", "out", "--no-progress")
    told = yaml.safe_load((here / "out" / "safemerge.yaml").read_text())
    assert set(told) <= set(keys())
    assert (told["gate"], told["num_layers"], told["method"]) == ("num_layers", 4, path.stem)
    asked = yaml.safe_load(path.read_text())
    assert {key: told[key] for key in asked if key not in ("gate", "threshold", "num_layers")} == {
        key: value for key, value in asked.items() if key not in ("gate", "threshold", "num_layers")
    }
    assert str(here) not in (here / "out" / "safemerge.yaml").read_text()
    run("merge", "--config", "out/safemerge.yaml", "-o", "again", "--no-progress")
    assert (here / "again" / WEIGHTS).read_bytes() == (here / "out" / WEIGHTS).read_bytes()
    assert (here / "task" / WEIGHTS).read_bytes() != (here / "out" / WEIGHTS).read_bytes()
    again = yaml.safe_load((here / "again" / "safemerge.yaml").read_text())
    assert again == told


@pytest.mark.parametrize(
    "knobs",
    [
        {"gate": "calibrated", "z_threshold": 30.0, "soft": True},
        {"gate": "reference", "reference_fraction": 0.99},
        {"gate": "random", "num_layers": 2, "seed": 11},
        {"gate": "random", "threshold": 1.0, "seed": 12},
        {"gate": "quantile", "quantile": 0.5},
        {"gate": "gap"},
        {"gate": "all", "module_weights": {"q_proj": (0.5, 0.5), r"layers.1.*": (0.9, 0.1)}},
        {"gate": "all", "method": "ties", "density": 0.4, "majority_sign_method": "frequency", "space": "delta"},
    ],
)
def test_every_gate_and_knob_travels(here, knobs):
    plan = merge_adapters("task", "safety", "s.safetensors", "out", **knobs)
    assert plan.selected
    run("merge", "--config", "out/safemerge.yaml", "-o", "again")
    assert (here / "again" / WEIGHTS).read_bytes() == (here / "out" / WEIGHTS).read_bytes()


def test_several_adapters_and_a_baked_base_travel(here):
    command = ["merge", "task", "safety", "other", "-s", "s.safetensors", "--gate", "all", "--bake", "aligned"]
    run(*command, "--weights", 0.6, 0.3, 0.1, "-o", "deep/out")
    told = yaml.safe_load((here / "deep" / "out" / "safemerge.yaml").read_text())
    assert told["safety"] == ["../../safety", "../../other"]
    assert told["weights"] == [0.6, 0.3, 0.1]
    run("merge", "--config", "deep/out/safemerge.yaml", "-o", "again")
    for file in ("model.safetensors", f"adapter/{WEIGHTS}"):
        assert (here / "again" / file).read_bytes() == (here / "deep" / "out" / file).read_bytes()


def test_the_command_line_overrides_the_file(here):
    (here / "m.yaml").write_text(
        "finetuned: task\nsafety: safety\nsubspace: s.safetensors\noutput: out\nthreshold: 0.9\n"
    )
    run("merge", "--config", "m.yaml", "--num-layers", 2, "--weights", "0.5/0.5", "--seed", 4)
    told = yaml.safe_load((here / "out" / "safemerge.yaml").read_text())
    assert (told["gate"], told["num_layers"], told["weights"], told["seed"]) == ("num_layers", 2, [0.5, 0.5], 4)
    assert "not empty" in run("merge", "--config", "m.yaml", code=2).stderr
    run("merge", "--config", "m.yaml", "--force", "--seed", 3)
    told = yaml.safe_load((here / "out" / "safemerge.yaml").read_text())
    assert (told["gate"], told["threshold"], told["seed"]) == ("threshold", 0.9, 3)


def test_weights_as_numbers_slashes_or_commas_are_one(here):
    base = ["merge", "task", "safety", "-s", "s.safetensors", "--gate", "all"]
    for place, words in enumerate((["0.6", "0.4"], ["0.6/0.4"], ["0.6,0.4"])):
        run(*base, "--weights", *words, "-o", f"out{place}")
    found = {(here / f"out{place}" / WEIGHTS).read_bytes() for place in range(3)}
    assert len(found) == 1
    assert "no number" in run(*base, "--weights", "0.6/x", "-o", "out9", code=2).stderr


@pytest.mark.parametrize("alias", sorted(COMBINATION_TYPES))
def test_pefts_names_are_accepted(tmp_path, alias):
    (tmp_path / "m.yaml").write_text(f"combination_type: {alias}\n")
    method, space = COMBINATION_TYPES[alias]
    assert read_recipe(tmp_path / "m.yaml") == {"method": method, "space": space}
    assert space in get_method(method).spaces


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("tresh: 1", "'tresh', which is unknown"),
        ("treshold: 0.3", "did you mean 'threshold'"),
        ("- 1", "holds no settings"),
        ("a: [", "is no YAML"),
        ("method: ties\ncombination_type: ties", "give one or the other"),
    ],
)
def test_files_that_cannot_be(tmp_path, text, match):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_recipe(tmp_path / "m.yaml")


def test_what_is_missing_is_named(here):
    assert "cannot be read" in run("merge", "--config", "nowhere.yaml", code=2).stderr
    assert "subspace and output not given" in run("merge", "task", code=2).stderr


def test_sweep_prints_and_writes(here):
    base = ["sweep", "task", "safety", "-s", "s.safetensors"]
    shown = run(*base, "--thresholds", "0.9,0.95", "--gates", "all,num_layers=2,calibrated=-1", "--weights",
                "0.9/0.1,0.5/0.5", "--methods", "linear,project", "-o", "s.csv", "--plot", "s.png")  # fmt: skip
    assert "15 merges of 6 modules, none of them made" in shown.stdout
    assert "num_layers 2" in shown.stdout
    assert len((here / "s.csv").read_text().splitlines()) == 16
    assert (here / "s.png").read_bytes().startswith(b"\x89PNG")
    assert "45 merges of 6 modules" in run(*base).stdout
    for words, message in (
        (["--gates", "al"], "did you mean 'all'"),
        (["--gates", "all=3"], "has no knob"),
        (["--gates", "quantile"], "quantile=None"),
        (["--thresholds", "x"], "no number"),
        (["--plot", "s.txt"], "must end in one of"),
        (["--weights", "0.8"], "give finite numbers"),
    ):
        assert message in run(*base, *words, code=2).stderr
