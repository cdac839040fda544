"""An adapter goes to the Hub with what belongs to it, a card, and nothing of this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from typer.testing import CliRunner

from safemerge_callback import SafeMergeError, Subspace, load_adapter, merge_adapters, push_adapter
from safemerge_callback.cli import app
from safemerge_callback.errors import AdapterError
from safemerge_callback.io.card import BEGIN, END
from tests.support.hub import READER

ROOT = str(Path(__file__).parents[1])


@pytest.fixture
def adapter(world, chat_tokenizer, tmp_path):
    folder = tmp_path / "safety"
    shutil.copytree(world.safety, folder)
    chat_tokenizer.save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"pickled")
    (folder / "checkpoint-3").mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(world.folder)}))
    card = (folder / "README.md").read_text().replace("tags:\n", f"tags:\n- base_model:adapter:{world.folder}\n", 1)
    (folder / "README.md").write_text(re.sub(r"base_model: .*", f"base_model: {world.folder}", card, count=1))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "name_or_path": str(world.folder)}))
    return folder


def parts(repo):
    card = repo.tree()["README.md"].decode()
    assert card.count(BEGIN) == card.count(END) == 1
    _, head, rest = card.split("---\n", 2)
    return yaml.safe_load(head), rest.replace("\\", "")


def test_a_safety_adapter_is_there_whole_and_serves_from_there(hub, world, adapter, tmp_path):
    address = push_adapter(adapter, "me/safety", base_model="org/aligned", license="mit")
    repo = hub.repos["me/safety"]
    assert address == f"me/safety@{repo.branches['main']}"
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(repo.tree()) == {".gitattributes", "README.md", *weights, *tokenizer}
    for name, content in repo.tree().items():
        assert str(world.folder).encode() not in content, name
    head, text = parts(repo)
    assert (head["base_model"], head["library_name"], head["license"]) == ("org/aligned", "peft", "mit")
    assert set(head["tags"]) >= {"lora", "safemerge", "safety-adapter"}
    for words in (
        "| rank | 3 |",
        "4: q_proj (2), v_proj (2)",
        'safety_adapter="me/safety"',
        "| base model | org/aligned",
    ):
        assert words in text, words
    assert "More Information Needed" not in text
    there, here = load_adapter(address), load_adapter(adapter)
    assert there.base_model == "org/aligned"
    assert there.factors.keys() == here.factors.keys()
    merge_adapters(world.safety, address, world.subspace, tmp_path / "out", gate="all")
    assert address in (tmp_path / "out" / "README.md").read_text().replace("\\", "")


def test_what_a_merge_or_a_run_says_of_itself_stays(hub, world, adapter, tmp_path):
    trainer = world.trainer(tmp_path / "run", world.guard(every=2))
    trainer.train()
    trainer.save_model()
    push_adapter(tmp_path / "run", "me/run", base_model="org/chat")
    head, text = parts(hub.repos["me/run"])
    assert "merged into it 3 times" in text
    assert "PEFT" in text.partition(END)[2]
    assert "safety-adapter" not in head["tags"]
    assert "safemerge.jsonl" in hub.repos["me/run"].tree()
    mine = hub.repos["me/run"].tree()["README.md"].decode().replace("Framework versions", "My Own Words")
    hub.repos["me/run"].commit({**hub.repos["me/run"].tree(), "README.md": mine.encode()}, "by hand")
    push_adapter(tmp_path / "run", "me/run", base_model="org/chat")
    assert "My Own Words" in parts(hub.repos["me/run"])[1]


def test_a_card_that_somebody_wrote_goes_along(hub, adapter):
    card = (adapter / "README.md").read_text().replace("[More Information Needed]", "me", 1)
    (adapter / "README.md").write_text(card)
    push_adapter(adapter, "me/safety", base_model="org/aligned")
    text = parts(hub.repos["me/safety"])[1]
    assert "**Developed by:** me" in text
    (adapter / "README.md").write_bytes(b"\xff no text")
    push_adapter(adapter, "me/other", base_model="org/aligned")
    assert "# LoRA adapter" in parts(hub.repos["me/other"])[1]


def test_evidence_goes_along_where_it_is_of_the_same_config(hub, adapter):
    (adapter / "safemerge_evidence.json").write_text("{}")
    push_adapter(adapter, "me/safety", base_model="org/aligned")
    assert "safemerge_evidence.json" not in hub.repos["me/safety"].tree()
    shutil.copytree(adapter, adapter.with_name("named"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    named = {**config, "base_model_name_or_path": "org/aligned"}
    (adapter.with_name("named") / "adapter_config.json").write_text(json.dumps(named))
    push_adapter(adapter.with_name("named"), "me/safety")
    assert "safemerge_evidence.json" in hub.repos["me/safety"].tree()


def test_the_environment_names_the_hub(hub, world, tmp_path):
    shutil.copy(world.subspace, tmp_path / "v.safetensors")
    here = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    words = [sys.executable, "-m", "safemerge_callback", "push", "v.safetensors", "me/v"]
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    pushed = subprocess.run(words, env={**os.environ, **here, "PYTHONPATH": ROOT}, **how)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip() == f"me/v@{hub.repos['me/v'].branches['main']}/v.safetensors"


def test_a_base_that_is_a_folder_here_must_be_named(hub, adapter, world):
    with pytest.raises(AdapterError, match=r"a folder of this machine: say what it is called on the Hub"):
        push_adapter(adapter, "me/safety")
    with pytest.raises(AdapterError, match="say what it is called on the Hub"):
        push_adapter(adapter, "me/safety", base_model="/models/chat")
    assert hub.asked == []
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base in ("gpt2", "org/chat", None):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        push_adapter(adapter, "me/safety")
        assert hub.repos["me/safety"].tree()["adapter_config.json"] == (adapter / "adapter_config.json").read_bytes()


def test_what_cannot_be_pushed_leaves_no_repository(hub, world, adapter, tmp_path, monkeypatch):
    def refused(says, folder=adapter, **how):
        with pytest.raises(AdapterError, match=says):
            push_adapter(folder, "me/safety", **{"base_model": "org/chat", **how})
        assert hub.repos == {}

    refused("no such folder", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refused("has no adapter_config.json", tmp_path / "empty")
    refused("your token may not write there.*Nothing was committed", token=READER)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("the Hub is switched off here", tmp_path / "absent")


@pytest.fixture
def safemerge():
    def run(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    return run


def test_the_verb_pushes_both_kinds_and_they_are_taken_by_every_verb(hub, world, adapter, safemerge, tmp_path):
    file = tmp_path / "tiny.subspace.safetensors"
    file.write_bytes(Path(world.subspace).read_bytes())
    pushed = safemerge("push", file, "me/v", "--private", "--license", "mit")
    address = f"me/v@{hub.repos['me/v'].branches['main']}/tiny.subspace.safetensors"
    assert (pushed.exit_code, pushed.stdout.strip()) == (0, address)
    assert hub.repos["me/v"].private
    pushed = safemerge("push", adapter, "me/safety", "--base-model", "org/aligned", "--commit-message", "first")
    assert pushed.exit_code == 0
    assert hub.repos["me/safety"].messages[-1] == "first"
    assert safemerge("describe", "me/v", "--verify").exit_code == 0
    here, there = (safemerge("measure", world.safety, "-s", one, "--json") for one in (file, "me/v"))
    assert here.stdout == there.stdout
    merged = safemerge("merge", world.safety, "me/safety", "-s", "me/v", "-o", tmp_path / "out")
    assert merged.exit_code == 0, merged.output
    assert f"subspace: {address}" in (tmp_path / "out" / "safemerge.yaml").read_text()
    again = safemerge("merge", "--config", tmp_path / "out" / "safemerge.yaml", "-o", tmp_path / "again")
    assert again.exit_code == 0, again.output
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "again"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["push", "absent", "me/v"], "'absent': no such file"),
        (["push", "SUBSPACE", "me/../v"], "give the id of a repository"),
        (["push", "SUBSPACE", "me/v", "--base-model", "org/chat"], "--base-model is of an adapter"),
        (["measure", "SAFETY", "-s", "me/absent"], "'me/absent' is no file here and no model on the Hub"),
        (["merge", "SAFETY", "-s", "me/empty", "-o", "OUT"], "has no subspace file, only '.gitattributes'"),
    ],
)
def test_what_the_verbs_refuse_is_one_line_and_exit_code_2(hub, world, safemerge, tmp_path, words, says):
    hub.make("me/empty")
    places = {"SUBSPACE": world.subspace, "SAFETY": world.safety, "OUT": tmp_path / "out"}
    done = safemerge(*(places.get(word, word) for word in words))
    assert done.exit_code == 2
    assert says in done.output
    assert not (tmp_path / "out").exists()
    assert issubclass(AdapterError, SafeMergeError)
    assert Subspace.load(world.subspace).address is None
