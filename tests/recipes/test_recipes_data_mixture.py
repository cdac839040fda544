"""TRL's `datasets:` in a recipe: joined as TRL joins them, in the recipes' forms, and what is refused."""

import json

import datasets
import pytest
import yaml

from recipes.data import EXAMPLE_FORM, load_examples
from recipes.data.mixture import KEYS, mixture_rows
from recipes.data.preferences import PAIR_FORM
from recipes.dpo import load_pairs, parse_dpo
from recipes.finetune import load_data, parse_finetune
from safemerge_callback.errors import ConfigError

# transformers 5.23 calls it activation_checkpointing; trl 1.x, and earlier transformers, know the old name alone
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def written(folder, name, n, **more):
    path = folder / f"{name}.jsonl"
    rows = [{"prompt": f"{name} {at}", "completion": f"answer {at}", **more} for at in range(n)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def questions(rows):
    return [row["prompt"][-1]["content"] for row in rows]


def of_file(tmp_path, mixture, parse=parse_finetune, **more):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"datasets": mixture, "output_dir": "out", "bf16": False, "use_cpu": True, **more}))
    return parse(["--config", str(path)])[0]


@pytest.mark.parametrize("fractions", [None, (3, 1), (0.5, 0.5), (0.2, 0.8)])
def test_rows_are_those_of_trl_in_their_order(tmp_path, monkeypatch, fractions):
    from trl import DatasetMixtureConfig, get_dataset

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    entries = [
        {"path": "json", "data_files": written(tmp_path, name, n, source="x"), "columns": ["prompt", "completion"]}
        for name, n in (("first", 7), ("second", 5))
    ]
    for entry, share in zip(entries, fractions or (), strict=False):
        entry["fraction"] = share
    theirs = get_dataset(DatasetMixtureConfig(datasets=[dict(entry) for entry in entries]))["train"]
    ours = load_data(of_file(tmp_path, entries))
    assert questions(ours) == theirs["prompt"]
    assert [row["completion"][0]["content"] for row in ours] == theirs["completion"]


def test_a_file_by_its_path_and_data_of_the_recipes_stand_beside_the_hubs(tmp_path):
    entries = [{"path": written(tmp_path, "mine", 3)}, {"path": "cities", "split": "test"}]
    rows = mixture_rows(EXAMPLE_FORM, entries)
    assert questions(rows[:3]) == ["mine 0", "mine 1", "mine 2"]
    assert rows[3:] == load_examples("cities", "test")
    assert len(load_data(of_file(tmp_path, entries, num_examples=5))) == 5


def test_preferences_are_read_from_a_mixture_too(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    pairs = load_pairs(of_file(tmp_path, [{"path": str(path)}, {"path": "cities"}], parse_dpo))
    assert (pairs[0]["chosen"][0]["content"], pairs[0]["rejected"][0]["content"]) == ("b", "c")
    assert len(pairs) > 100


def test_a_data_set_of_the_hub_is_asked_for_as_trl_asks_for_it(monkeypatch):
    calls = []

    def load_dataset(repo, name, **how):
        calls.append((repo, name, how))
        return [{"prompt": "a", "completion": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    entry = {"path": "org/set", "name": "main", "data_dir": "part", "split": "train[:9]"}
    assert questions(mixture_rows(EXAMPLE_FORM, [entry])) == ["a"]
    assert calls == [("org/set", "main", {"split": "train[:9]", "revision": None, "data_dir": "part"})]


def test_the_keys_are_trls():
    from dataclasses import fields

    from trl.scripts.utils import DatasetConfig

    assert {field.name for field in fields(DatasetConfig)} == set(KEYS)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("org/set", r"datasets\[0\] is 'org/set': give a mapping with path"),
        ({"split": "train"}, r"datasets\[0\] is .*: give a mapping with path"),
        ({"path": "org/set", "column": ["a"]}, r"datasets\[0\]: key 'column' is unknown.*did you mean 'columns'"),
        ({"path": "cities", "columns": ["a"]}, "'cities' is data of the recipes, which has split and fraction alone"),
        ({"path": "FILE", "split": "test"}, r"'.*mine.jsonl' is a file, which has no split 'test': leave split out"),
        (
            {"path": "FILE", "columns": ["prompts"]},
            r"datasets\[0\] '.*' has no column 'prompts', only \['completion', 'prompt'\]; did you mean 'prompt'",
        ),
        (
            {"path": "FILE", "columns": ["prompt"]},
            r"row 1 of datasets\[0\] '.*' has no question with an answer in its columns \['prompt'\]\. Give messages",
        ),
        ({"path": "lost.jsonl"}, r"datasets\[0\] 'lost.jsonl': there is no such file"),
        (
            {"path": "FILE", "fraction": 0},
            r"datasets\[0\]: fraction is 0: give each entry one above 0, or none of them",
        ),
        ({"path": "FILE", "fraction": "half"}, r"datasets\[0\]: fraction is 'half'"),
    ],
)
def test_an_entry_that_is_none_is_refused_by_its_place(tmp_path, entry, says):
    path = written(tmp_path, "mine", 2)
    if isinstance(entry, dict) and entry.get("path") == "FILE":
        entry = {**entry, "path": path}
    with pytest.raises(ConfigError, match=says):
        mixture_rows(EXAMPLE_FORM, [entry])


def test_rows_of_another_form_are_refused_with_the_columns_that_they_have(tmp_path):
    with pytest.raises(ConfigError, match=r"no prompt with two answers in its columns \['completion', 'prompt'\]"):
        mixture_rows(PAIR_FORM, [{"path": written(tmp_path, "mine", 1)}])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"data": "sentiment"}, "data is 'sentiment' and datasets is .*: give one of them"),
        ({"data_split": "test"}, "data_split is 'test' beside datasets: write split in each of them"),
        ({"streaming": True}, "setting 'streaming' is unknown"),
        ({"datasets": None}, "data is '' and datasets is None: give one of them"),
    ],
)
def test_what_says_twice_or_not_at_all_which_rows_is_refused(tmp_path, more, says):
    with pytest.raises(ConfigError, match=says):
        of_file(tmp_path, **{"mixture": [{"path": "cities"}], **more} if "datasets" not in more else {"mixture": None})
