"""One reader of addresses: a path, or `org/name[@revision]`, means the same wherever a part is named."""

import shutil

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, get_peft_model

from safemerge_callback import load_adapter
from safemerge_callback.adapters import open_adapter
from safemerge_callback.errors import AdapterError, ConfigError, SubspaceError
from safemerge_callback.evaluation.loading import is_adapter, load_pretrained
from safemerge_callback.io.addresses import Address, address_of, fetched, without_folders
from safemerge_callback.offline import BaseModel, merge_adapters
from safemerge_callback.offline.merge_yaml import read_recipe
from safemerge_callback.subspace import build_subspace
from safemerge_callback.subspace.checkpoints import CheckpointShards

COMMITS = {"main": "a" * 40, "v1": "b" * 40, "refs/pr/2": "c" * 40}


def cached(hub, name, save):
    """A model of the Hub in its cache, one commit a revision, each written by `save(folder, number)`."""
    repo = hub / f"models--org--{name}"
    for number, (revision, commit) in enumerate(COMMITS.items()):
        (repo / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
        save(repo / "snapshots" / commit, number)


@pytest.fixture
def hub(tmp_path, tiny_llama, monkeypatch):
    """A cache with a model and an adapter of three commits: models of seeds 0, 1, 2 and adapters of ranks 1, 2, 3."""

    def adapter(folder, number):
        rank = number + 1
        lora = LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(tiny_llama(), lora).save_pretrained(folder)

    cached(tmp_path / "hub", "lora", adapter)
    cached(tmp_path / "hub", "model", lambda folder, number: tiny_llama(seed=number).save_pretrained(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rank_of(adapter):
    return next(iter(adapter.factors.values())).rank


@pytest.mark.parametrize("read", [load_adapter, open_adapter])
def test_an_adapter_is_pinned_in_its_address(hub, read):
    assert [rank_of(read(f"org/lora{at}")) for at in ("", "@main", "@v1", "@refs/pr/2", f"@{'b' * 40}")] == [
        1,
        1,
        2,
        3,
        2,
    ]
    assert rank_of(read("org/lora", revision="v1")) == 2
    assert is_adapter("org/lora@v1")
    assert not is_adapter("org/model@v1")
    with pytest.raises(AdapterError, match=r"'org/lora@v1': revision='main' is given too"):
        read("org/lora@v1", revision="main")
    with pytest.raises(AdapterError, match=r"'org/lora' .* could not be fetched from the Hub at revision 'v9'"):
        read("org/lora@v9")


def test_a_checkpoint_is_pinned_in_its_address_by_every_reader(hub, tiny_llama):
    wanted = tiny_llama(seed=1).lm_head.weight
    assert torch.equal(CheckpointShards.open("org/model@v1").read("lm_head"), wanted)
    assert torch.equal(load_pretrained_weights("org/model@v1"), wanted)
    assert BaseModel.find("org/model@v1").folder.name == "b" * 40
    assert BaseModel.find("org/model").folder.name == "a" * 40
    with pytest.raises(SubspaceError, match=r"base model 'org/model' .* at revision 'v9'"):
        BaseModel.find("org/model@v9")
    with pytest.raises(ConfigError, match=r"'org/model@v1': revision='main' is given too"):
        load_pretrained("org/model@v1", who="model", revision="main")


def load_pretrained_weights(source):
    """The tokenizer, which is not there, is asked of the same address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safemerge_callback.evaluation.loading.load_tokenizer", lambda *_, **__: None)
        return load_pretrained(source, who="model")[0].lm_head.weight


def test_a_merge_and_its_recipe_take_the_same_address(hub, tiny_llama):
    for side, seed in (("chat", 0), ("base", 5)):
        tiny_llama(seed=seed).save_pretrained(hub / side)
    build_subspace(hub / "s.safetensors", aligned=hub / "chat", unaligned=hub / "base", progress=False)
    merge_adapters("org/lora@v1", "org/lora@refs/pr/2", "s.safetensors", "out", gate="all", bake="org/model@main")
    assert rank_of(load_adapter(hub / "out" / "adapter")) == 2
    recipe = read_recipe(hub / "out" / "safemerge.yaml")
    assert [recipe[part] for part in ("finetuned", "safety", "bake")] == [
        "org/lora@v1",
        "org/lora@refs/pr/2",
        "org/model@main",
    ]
    card = (hub / "out" / "README.md").read_text()
    assert "org/lora@v1" in card
    assert str(hub) not in card


def test_a_folder_of_that_very_name_wins(hub, tiny_llama):
    (hub / "org").mkdir()
    get_peft_model(tiny_llama(), LoraConfig(r=7, target_modules=["q_proj"])).save_pretrained(hub / "org" / "lora@v1")
    tiny_llama(seed=9).save_pretrained(hub / "org" / "model@v1")
    assert rank_of(load_adapter("org/lora@v1")) == 7
    assert CheckpointShards.open("org/model@v1").located.name == "model@v1"
    assert BaseModel.find("org/model@v1").folder == hub / "org" / "model@v1"
    shutil.rmtree(hub / "org")
    assert rank_of(load_adapter("org/lora@v1")) == 2


@pytest.mark.parametrize("text", ["/gone/away", "a b", "org/name/more", "org/name@", "@v1", "org/na me@v1"])
def test_what_is_neither_is_refused_with_both_spellings(text):
    with pytest.raises(ConfigError, match="no such folder, and not a Hub id such as 'org/name' or 'org/name@revision'"):
        address_of(text, "thing", error=ConfigError)


def test_a_path_is_fetched_as_it_is(tmp_path):
    assert address_of(tmp_path, "thing", error=ConfigError) == Address(tmp_path)
    assert fetched(Address(tmp_path), ["*"], "thing", error=ConfigError) == tmp_path


@pytest.mark.parametrize(
    ("sentence", "left"),
    [
        ("no file '/tmp/a b/c d.json' there", "no file 'c d.json' there"),
        ("no file /tmp/a/c.json there", "no file c.json there"),
        ("[Errno 2] 'C:\\runs\\x\\y'", "[Errno 2] 'y'"),
        ("see https://host/a/b and org/name", "see https://host/a/b and org/name"),
        ("'a' / 'b' and 'c'", "'a' / 'b' and 'c'"),
    ],
)
def test_a_sentence_keeps_the_last_part_of_each_path(sentence, left):
    assert without_folders(sentence) == left
