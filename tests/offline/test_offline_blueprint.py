"""What adapters hold beside their factors, baked: the logits are those of the adapted model, whatever PEFT saved."""

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from safemerge_callback.errors import AdapterError, SafeMergeError
from safemerge_callback.offline import BaseModel, merge_adapters
from safemerge_callback.subspace import build_subspace

# What training adds to a LoRA on q_proj; `tied` and `rows` are the model's, all others LoraConfig's.
SETTINGS = {
    "resized": {"rows": 67},
    "resized tied": {"rows": 67, "tied": True},
    "smaller": {"rows": 61},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved resized": {"rows": 67, "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved resized tied": {"rows": 67, "tied": True, "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding saved, tied": {"rows": 67, "tied": True, "modules_to_save": ["embed_tokens"]},
    "head saved, tied": {"tied": True, "modules_to_save": ["lm_head"]},
    "norms saved": {"modules_to_save": ["input_layernorm", "norm"]},
    "tokens": {"trainable_token_indices": [4, 5]},
    "tokens tied": {"tied": True, "trainable_token_indices": [5, 4]},
    "tokens resized": {"rows": 67, "trainable_token_indices": [64, 66]},
    "tokens resized tied": {"rows": 67, "tied": True, "trainable_token_indices": [64, 65, 66]},
    "tokens by module": {"trainable_token_indices": {"embed_tokens": [4, 5], "lm_head": [6]}},
    "tokens by module tied": {"tied": True, "trainable_token_indices": {"embed_tokens": [4, 5], "lm_head": [4, 5]}},
    "LoRA on resized": {"rows": 67, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}  # fmt: skip
TIED = [name for name in SETTINGS if name.endswith(" tied")]


@pytest.fixture
def trained(tmp_path, tiny_llama):
    """A function: the adapted model of a setting, its base in `base` and its adapter, as PEFT saves it, in `task`."""

    def make(rows=None, tied=False, **lora):
        tiny_llama(seed=1, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft and transformers tell of resizing, tying and what is saved
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
            if rows:
                model.resize_token_embeddings(rows)
            config = LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False, **lora})
            adapted = get_peft_model(model, config)
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for key, value in adapted.named_parameters():
                    if value.requires_grad and "lora_" not in key:
                        value.add_(0.1 * torch.randn(value.shape, generator=generator))
            adapted.save_pretrained(tmp_path / "task")
        return adapted.eval()

    return make


def baked(folder):
    (folder / "full").mkdir()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="safemerge: .*no tokenizer lies beside it")
        BaseModel.find(folder / "base").bake(folder / "task", folder / "full")
    return folder / "full"


def logits(model, rows):
    with torch.no_grad():
        return model(torch.arange(rows)[None, -30:]).logits


@pytest.mark.parametrize("name", SETTINGS)
def test_the_baked_model_is_the_adapted_one(tmp_path, trained, name):
    from transformers import AutoModelForCausalLM

    model = trained(**SETTINGS[name])
    rows = SETTINGS[name].get("rows", 64)
    found = AutoModelForCausalLM.from_pretrained(baked(tmp_path)).eval()
    assert found.config.vocab_size == rows
    torch.testing.assert_close(logits(found, rows), logits(model, rows), rtol=1e-4, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert not torch.allclose(logits(plain, 61)[..., :61], logits(found, 61)[..., :61], atol=1e-3)


@pytest.mark.parametrize("name", TIED)
def test_it_stays_tied_where_the_adapter_has_the_same_for_both(tmp_path, trained, name):
    trained(**SETTINGS[name])
    full = baked(tmp_path)
    same = "saved" not in name
    assert json.loads((full / "config.json").read_text())["tie_word_embeddings"] is same
    assert ("lm_head.weight" in load_file(full / "model.safetensors")) is not same


def edit(folder, change, **config):
    path = folder / "adapter_model.safetensors"
    held = {key: value.clone() for key, value in load_file(path).items()}
    change(held)
    save_file(held, path)
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | config))


def dropped(module):
    return lambda held: held.pop(f"base_model.model.{module}.weight")


def added(module, *shape):
    return lambda held: held.update({f"base_model.model.{module}.weight": torch.ones(shape)})


def same(held):
    """Only the config differs."""


@pytest.mark.parametrize(
    ("name", "change", "config", "says"),
    [
        ("resized", dropped("lm_head"), {}, r"resizes '.*' from 64 to 67 rows and leaves 'lm_head\.weight'"),
        ("resized", added("lm_head", 67, 9), {}, r"holds 'lm_head' as \(67, 9\), and the base"),
        ("norms saved", added("model.norm", 9), {}, r"holds 'norm' as \(9,\)"),
        ("tokens", same, {"trainable_token_indices": [4]}, "2 trained rows of 'embed_tokens', .* names 1 tokens"),
        ("tokens", same, {"trainable_token_indices": None}, "names 0 tokens"),
        ("tokens", same, {"trainable_token_indices": [4, 64]}, "row for token 64, and 'embed_tokens' has 64"),
        ("saved", added("score", 2), {}, "lacks, the first is 'score'"),
    ],
)
def test_what_cannot_be_baked_is_refused_first_with_the_path_that_was_given(
    tmp_path, trained, tiny_llama, monkeypatch, name, change, config, says
):
    trained(**SETTINGS[name])
    edit(tmp_path / "task", change, **config)
    tiny_llama(seed=9).save_pretrained(tmp_path / "raw")
    subspace = build_subspace(tmp_path / "v", aligned=tmp_path / "base", unaligned=tmp_path / "raw", progress=False)
    monkeypatch.setattr("safemerge_callback.offline.merge.measure", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(AdapterError, match=says) as refused:
        merge_adapters(tmp_path / "task", None, subspace, tmp_path / "out", method="pull", bake=tmp_path / "base")
    assert repr(str(tmp_path / "task")) in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_was_trained_with_goes_along_else_its_lack_is_told(
    tmp_path, trained, tiny_llama, chat_tokenizer
):
    from transformers import AutoTokenizer

    trained(**SETTINGS["resized"])
    chat_tokenizer.save_pretrained(tmp_path / "base")
    tiny_llama(seed=9).save_pretrained(tmp_path / "raw")
    parts = (tmp_path / "task", None, tmp_path / "v")
    how = {"gate": "all", "method": "pull", "bake": tmp_path / "base"}
    build_subspace(tmp_path / "v", aligned=tmp_path / "base", unaligned=tmp_path / "raw", progress=False)
    with pytest.warns(UserWarning, match=r"67 tokens in place of 64, and no tokenizer.* has the base model's") as told:
        merge_adapters(*parts, tmp_path / "without", **how)
    assert repr(str(tmp_path / "task")) in str(told[0].message)
    assert (tmp_path / "without" / "tokenizer.json").read_bytes() == (tmp_path / "base/tokenizer.json").read_bytes()
    more = AutoTokenizer.from_pretrained(tmp_path / "base")
    more.add_tokens(["<|call|>", "<|tool|>", "<|end|>"])
    more.chat_template = "{{ messages[0].content }}"
    more.save_pretrained(tmp_path / "task")
    merge_adapters(*parts, tmp_path / "with", **how)
    found = AutoTokenizer.from_pretrained(tmp_path / "with")
    assert (len(found), found.chat_template) == (67, "{{ messages[0].content }}")
    del how["bake"]
    merge_adapters(*parts, tmp_path / "adapter", **how)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "adapter")) == 67
    merge_adapters(*parts, tmp_path / "adapter", overwrite=True, **how)


@pytest.mark.parametrize("lost", ["tokenizer.json", "tokenizer_config.json"])
def test_half_a_tokenizer_beside_the_adapter_takes_the_place_of_none(tmp_path, trained, chat_tokenizer, lost):
    from transformers import AutoTokenizer

    trained()
    for folder in ("base", "task"):
        chat_tokenizer.save_pretrained(tmp_path / folder)
    (tmp_path / "task" / lost).unlink()
    assert AutoTokenizer.from_pretrained(baked(tmp_path)).get_vocab() == chat_tokenizer.get_vocab()


CODE = {"AutoConfig": "configuration_my.C", "AutoModelForCausalLM": "modeling_my.M", "AutoModel": "org/other--far.M"}


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_that_a_model_refers_to_is_copied_and_never_run(tmp_path, trained, where):
    trained()
    path = tmp_path / "base" / where
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | {"auto_map": {**CODE, "AutoTokenizer": ["slow_my.T", None]}}))
    for name in ("configuration_my.py", "modeling_my.py", "layers_my.py", "slow_my.py"):
        (tmp_path / "base" / name).write_text("raise SystemExit('run')\n")
    full = baked(tmp_path)
    assert {p.name for p in full.glob("*.py")} == {
        "configuration_my.py", "modeling_my.py", "layers_my.py", "slow_my.py",
    }  # fmt: skip
    assert json.loads((full / where).read_text())["auto_map"]["AutoConfig"] == "configuration_my.C"
    shutil.rmtree(full)
    (tmp_path / "base" / "modeling_my.py").unlink()
    with pytest.warns(UserWarning, match=r"code of its own .* lacks modeling_my\.py: .* cannot be loaded before"):
        baked(tmp_path)


def test_a_base_is_no_output(tmp_path, trained):
    trained()
    with pytest.raises(SafeMergeError, match="is one of the inputs"):
        merge_adapters(
            tmp_path / "task", None, tmp_path / "v", tmp_path / "base", overwrite=True, bake=tmp_path / "base",
            method="pull",
        )  # fmt: skip
