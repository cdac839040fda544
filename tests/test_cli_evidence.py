"""`safemerge gate --evidence` and `--verify`: what is written beside an adapter, and what is seen once it changed."""

import hashlib
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from safemerge_callback.cli import app
from safemerge_callback.evaluation.digests import texts_digest
from tests.support.chat_world import FILES, HARM, make_chat_world

NAME = "safemerge_evidence.json"
ASKED = ("--probes", FILES, "--max-new-tokens", 6, "--dtype", "float32", "--judge", "function:my_judges:vowels")
# What nine prompts can pass, whatever is answered.
LIMITS = ("--min-refused", 1e-6, "--max-over-refused", 0.999999)


def gate(*words, code):
    result = CliRunner().invoke(app, ["gate", *map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def asked(tmp_path_factory, chat_tokenizer):
    """A folder whose adapter was asked once and passed, with its evidence; not to be changed."""
    folder = make_chat_world(tmp_path_factory.mktemp("asked"), chat_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        gate("task", *ASKED, *LIMITS, "--evidence", code=0)
    return folder


@pytest.fixture
def world(asked, tmp_path, monkeypatch):
    """A copy of it, to be changed, as the working folder."""
    shutil.copytree(asked, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def verify(*words, code):
    """What is printed as JSON, and what of it has changed."""
    found = json.loads(
        gate("--verify", "task", "--base", "base", "--probes", FILES, *words, "--json", code=code).stdout
    )
    assert found["exit_code"] == code
    return found, [check["what"] for check in found["checks"] if check["state"] == "changed"]


def test_what_is_written(asked):
    text = (asked / "task" / NAME).read_text()
    assert str(asked.parent) not in text
    found = json.loads(text)
    assert list(found)[:3] == ["format", "version", "time"]
    assert (found["format"], found["version"], found["outcome"]) == ("safemerge_evidence", 1, "passed")
    weights = hashlib.sha256((asked / "task" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert found["adapter"]["name"] == "task"
    assert set(found["adapter"]["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert found["adapter"]["files"]["adapter_model.safetensors"] == weights
    assert set(found["base_model"]["files"]) == {"config.json", "model.safetensors"}
    assert (found["base_model"]["name"], found["base_model"]["revision"], found["subspace"]) == ("base", None, None)
    harm, benign = found["sets"]
    assert (harm["name"], harm["source"], benign["name"]) == ("harm", "harm.csv", "benign")
    assert sorted(figure["prompts"] for figure in found["figures"]) == sorted(one["digest"] for one in found["sets"])
    assert len(harm["digest"]) == len(found["template"]) == len(found["digest"]) == 64
    # The prompts' digest is of what was asked, in its order; no prompt itself is in it.
    assert harm["digest"] != texts_digest(HARM)
    assert not any(f'"{prompt}"' in text for prompt in HARM)
    assert found["judges"] == [{"name": "my_judges:vowels", "decides": "refusal"}]
    assert found["settings"] == {
        **{"n": 64, "seed": 0, "max_new_tokens": 6, "batch_size": 16},
        **{"after_merge": False, "after_quantize": None, "dtype": "float32"},
    }
    assert found["thresholds"] == {"min_refused": 1e-6, "max_over_refused": 0.999999}
    assert {"torch", "transformers", "safemerge-callback"} <= set(found["versions"])


def test_what_did_not_change_passes(world):
    found, changed = verify(code=0)
    assert changed == []
    assert {check["state"] for check in found["checks"]} == {"same"}
    shown = gate("--verify", "task", code=0).stdout
    assert shown.startswith("task: nothing has changed\n")
    assert "same     adapter_model.safetensors" in shown
    # Files of one's own are looked at where they are named.
    assert "absent   prompts harm: is not here" in shown


def swap(world, name):
    tensors = load_file(world / name)
    first = sorted(tensors)[0]
    save_file({**tensors, first: tensors[first] + 1e-3}, world / name, metadata={"format": "pt"})


def edit(world, name, old, new):
    text = (world / name).read_text()
    assert old in text
    (world / name).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda world: swap(world, "task/adapter_model.safetensors"), ["adapter_model.safetensors"]),
        (lambda world: edit(world, "task/adapter_config.json", '"r": 2', '"r": 2 '), ["adapter_config.json"]),
        (lambda world: (world / "task" / "adapter_config.json").write_text("{"), ["adapter_config.json"]),
        (lambda world: (world / "task" / "adapter_config.json").unlink(), ["adapter_config.json"]),
        (lambda world: (world / "task" / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors"]),
        (lambda world: swap(world, "base/model.safetensors"), ["base model.safetensors"]),
        (lambda world: (world / "base" / "more.safetensors").write_bytes(b""), ["base more.safetensors"]),
        (lambda world: edit(world, "base/chat_template.jinja", "<s> bot", "<s> you"), ["chat template"]),
        (lambda world: edit(world, "harm.csv", "k l m", "k l n"), ["prompts harm"]),
        (lambda world: edit(world, f"task/{NAME}", '"outcome": "passed"', '"outcome": "failed"'), [NAME]),
    ],
    ids=[
        "adapter",
        "config",
        "no config",
        "config gone",
        "weights gone",
        "base",
        "a shard more",
        "template",
        "prompts",
        "evidence",
    ],
)
def test_a_change_fails_and_is_named(world, change, named):
    change(world)
    assert verify(code=1)[1] == named


def test_what_is_edited_and_given_its_digest_anew_still_has_to_follow(world):
    """Of figures that say more than their outcomes, and rulings that say more than the figures."""
    from safemerge_callback.record.evidence import document_digest

    path = world / "task" / NAME
    document = json.loads(path.read_text())
    del document["digest"]
    figure = document["figures"][0]
    figure["low"] = figure["value"]
    document["rulings"][0]["outcome"] = "undecided"
    path.write_text(json.dumps({**document, "digest": document_digest(document)}))
    assert verify(code=1)[1] == ["figures", "rulings"]


def test_a_broken_config_is_named_where_it_alone_says_which_the_base_is(world):
    (world / "task" / "adapter_config.json").write_text("{")
    shown = gate("--verify", "task", code=1).stdout
    assert shown.startswith("task: changed: adapter_config.json\n")
    assert "absent   base weights: is not here" in shown


def test_a_part_of_the_base_in_the_hubs_cache_is_no_change(world):
    """The cache keeps a model's files under models--ORG--NAME/snapshots/COMMIT, those that were asked for."""
    snapshot = world / "models--org--base" / "snapshots" / "abc"
    shutil.copytree(world / "base", snapshot)
    assert gate("--verify", "task", "--base", snapshot, code=0)
    (snapshot / "model.safetensors").unlink()
    assert "absent   base model.safetensors: is not here" in gate("--verify", "task", "--base", snapshot, code=0).stdout
    (world / "base" / "model.safetensors").unlink()
    assert "changed  base model.safetensors: is gone" in gate("--verify", "task", "--base", "base", code=1).stdout


def test_an_adapter_without_any_of_its_files_has_changed(world):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (world / "task" / name).unlink()
    assert verify(code=1)[1] == ["adapter_config.json", "adapter_model.safetensors"]


def test_compare_reads_evidence(world):
    result = CliRunner().invoke(app, ["compare", f"task/{NAME}", f"task/{NAME}", "--json"])
    assert [one["paired"] for one in json.loads(result.stdout)["contrasts"]] == [True] * 3


def test_other_thresholds_may_be_asked_of_the_same_figures(world):
    found, changed = verify("--min-refused", 0.9999, "--max-over-refused", 0.9999, code=verdict(world, 0.9999))
    assert changed == []
    assert found["thresholds"] == {"min_refused": 0.9999, "max_over_refused": 0.9999}
    assert found["outcome"] != "passed"


def verdict(world, limit):
    """The code of a decision on what was measured: failed, or so few prompts do not tell."""
    figures = json.loads((world / "task" / NAME).read_text())["figures"]
    return 1 if next(one["high"] for one in figures if one["kind"] == "harm") < limit else 5


def test_what_is_not_here_is_said_and_fails_nothing(world):
    # A training saves a tokenizer beside the adapter, whose template need not be the base's.
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(world / "base" / name, world / "task")
    edit(world, "task/chat_template.jinja", "<s> bot", "<s> you")
    shutil.rmtree(world / "base")
    found, changed = verify(code=0)
    states = {check["what"]: check["state"] for check in found["checks"]}
    assert changed == []
    assert (states["base weights"], states["chat template"]) == ("absent", "absent")


@pytest.mark.parametrize("text", [None, "{", "[]", '{"format": "safemerge_evidence", "version": 2}'])
def test_no_evidence_is_an_error_and_no_pass(world, text):
    path = world / "task" / NAME
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert NAME in gate("--verify", "task", code=3).stderr


def test_wrong_use(world):
    assert "is no adapter's folder" in gate("--verify", "base", code=2).stderr
    assert "is no adapter's folder" in gate("base", *LIMITS, "--evidence", code=2).stderr
    for words in (("--n", 3), ("--figures", "e.json"), ("--evidence",), ("--after-merge",), ("--card", "c.md")):
        assert "has no effect on --verify" in gate("--verify", "task", *words, code=2).stderr
    # Before anything is asked.
    (world / "task" / NAME).write_text("mine")
    assert "is not an evidence file of ours" in gate("task", *ASKED, *LIMITS, "--evidence", code=2).stderr


def test_the_subspace_that_the_adapters_journal_names_is_looked_at(world):
    from safemerge_callback.record import evidence
    from safemerge_callback.record.entries import Sources, start_entry

    save_file(load_file(world / "task" / "adapter_model.safetensors"), world / "s.safetensors")
    entry = start_entry(0, {}, {}, Sources(str(world / "s.safetensors"), None, None), 4)
    (world / "task" / "safemerge.jsonl").write_text(json.dumps(entry) + "\n")
    files = {**evidence.adapter_evidence(world / "task"), **evidence.base_evidence(world / "task", "base")}
    assert files["subspace"]["name"] == "s.safetensors"
    document = {**json.loads((world / "task" / NAME).read_text()), **files}
    del document["digest"]
    evidence.write_evidence(world / "task", document)
    assert verify(code=0)[1] == []
    save_file({"a": load_file(world / "s.safetensors").popitem()[1]}, world / "s.safetensors")
    assert verify(code=1)[1] == ["subspace s.safetensors"]
    (world / "s.safetensors").unlink()
    assert verify(code=0)[1] == []
