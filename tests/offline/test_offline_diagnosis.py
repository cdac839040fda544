"""What a diagnosis finds: of packages, of a model's files, of an adapter and whether it fits."""

import shutil

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from safemerge_callback.offline import diagnosis as module
from safemerge_callback.offline.diagnosis import diagnosis
from tests.support.world import SIZES, TARGETS, make_world, with_lora


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def chat(world, chat_tokenizer, tmp_path):
    """The aligned checkpoint with a tokenizer that has a chat template."""
    shutil.copytree(world.folder / "aligned", tmp_path / "chat")
    chat_tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def of(findings, what):
    return [(one.state, one.words) for one in findings if one.what == what]


def test_a_model_and_an_adapter_that_fit(world, chat):
    findings = diagnosis(str(chat), world.safety)
    assert of(findings, "model") == [
        ("ok", "llama with 14 linear layers in safetensors: a subspace can be built with its counterpart")
    ]
    assert of(findings, "language head") == [("ok", "LlamaForCausalLM")]
    assert of(findings, "chat template")[0][0] == "ok"
    assert of(findings, "adapter") == [("ok", "a plain LoRA of rank 3 in 4 modules: measure, merge, pull, bake")]
    assert of(findings, "adapter on model") == [("ok", "all 4 modules are there, in their shapes")]
    assert str(findings[0]).startswith("ok       python: 3.")
    assert not any(one.state == "problem" for one in findings)


def test_an_adapter_alone_is_looked_at_on_the_base_that_it_names(world, chat, tmp_path):
    model = world.model(modules_to_save=["lm_head"])
    model.peft_config["default"].base_model_name_or_path = str(chat)
    model.save_pretrained(tmp_path / "adapter")
    findings = diagnosis(str(tmp_path / "adapter"))
    assert f"base {chat}" in of(findings, "adapter")[0][1]
    assert of(findings, "adapter")[1] == (
        "note",
        "it also holds trained tensors of lm_head, which merges leave as they are",
    )
    assert of(findings, "adapter on model")[0][0] == of(findings, "model")[0][0] == "ok"
    (nameless,) = of(diagnosis(adapter=world.safety), "model")
    assert nameless == ("note", "the adapter's config names no base: give MODEL, too")


def test_what_does_not_fit_is_a_problem_with_its_reason(world, chat, tmp_path):
    other = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 64, "num_hidden_layers": 3}))
    with_lora(other, TARGETS).save_pretrained(tmp_path / "other")
    (fit,) = of(diagnosis(str(chat), str(tmp_path / "other")), "adapter on model")
    assert fit[0] == "problem"
    assert fit[1].startswith("the model lacks layers.2.self_attn.q_proj, layers.2.self_attn.v_proj; layers.0")
    assert fit[1].endswith("and 1 more are of another shape there: give the base that it was trained on")
    world.model(use_dora=True).save_pretrained(tmp_path / "dora")
    (refused,) = of(diagnosis(str(chat), str(tmp_path / "dora")), "adapter")
    assert refused[0] == "problem"
    assert "use_dora=True" in refused[1]
    assert of(diagnosis(str(tmp_path / "nowhere")), "model")[0][0] == "problem"


def test_a_model_that_cannot_be_asked(world, chat):
    assert of(diagnosis(str(world.folder / "aligned")), "chat template")[0][0] == "problem"
    (chat / "chat_template.jinja").unlink()
    (template,) = of(diagnosis(str(chat)), "chat template")
    assert template == (
        "problem",
        "none, so nothing can be asked (replay, harvest, eval, gate): give a chat or instruct model",
    )
    config = chat / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForSequenceClassification"))
    (head,) = of(diagnosis(str(chat)), "language head")
    assert head[0] == "problem"
    assert head[1].startswith("LlamaForSequenceClassification says no next tokens")


def test_packages_that_are_old_or_absent(monkeypatch):
    needed = ["peft>=0.18", "tqdm", "torch>=2.7", 'cma>=4.0; extra == "search"', 'ruff>=0.11; extra == "dev"']
    here = {"peft": "0.9.1", "tqdm": None, "torch": "2.13.0+cpu", "cma": "3.2", "axolotl": "0.19"}
    monkeypatch.setattr(module, "requires", lambda _: needed)
    monkeypatch.setattr(module, "versions_of", lambda *names: {name: here.get(name) for name in names})
    findings = diagnosis()
    assert of(findings, "peft") == [("problem", "0.9.1 is older than 0.18: pip install -U 'peft>=0.18'")]
    assert of(findings, "tqdm") == [("problem", "not installed: pip install 'tqdm>=0'")]
    assert of(findings, "torch") == [("ok", "2.13.0+cpu")]
    assert of(findings, "extra search") == [
        ("note", "cma absent or old: pip install 'safemerge-callback[search]'"),
    ]
    assert of(findings, "extra dev") == []
    assert of(findings, "hosts") == [("ok", "axolotl 0.19")]
