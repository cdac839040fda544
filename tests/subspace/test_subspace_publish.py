"""A subspace goes to the Hub in one commit with a card that says what it is, or nothing goes."""

from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml

from safemerge_callback import Subspace
from safemerge_callback.errors import SubspaceError
from safemerge_callback.io.card import BEGIN, END
from safemerge_callback.subspace import compress_subspace
from safemerge_callback.subspace.publish import subspace_section
from tests.support.hub import READER


@pytest.fixture
def subspace(world, tmp_path):
    (tmp_path / "tiny.subspace.safetensors").write_bytes(Path(world.subspace).read_bytes())
    return Subspace.load(tmp_path / "tiny.subspace.safetensors")


def head_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_what_is_pushed_is_there_and_opens_again(hub, subspace, tmp_path):
    address = subspace.push_to_hub("me/v", private=True)
    repo = hub.repos["me/v"]
    assert address == f"me/v@{repo.branches['main']}/tiny.subspace.safetensors"
    assert repo.private
    assert repo.messages == ["initial commit", "Upload subspace 'tiny.subspace.safetensors' with safemerge"]
    opened = Subspace.from_pretrained(address)
    assert opened.fingerprint == subspace.fingerprint
    assert opened.verify() == subspace.verify()
    card = repo.tree()["README.md"].decode()
    assert set(head_of(card)["tags"]) == {"safemerge", "safety-subspace", "lora"}
    assert "license" not in head_of(card)
    plain = card.replace("\\", "")
    for words in ("| aligned | aligned;", "| unaligned | unaligned;", "q_proj (2)", subspace.fingerprint, '"me/v"'):
        assert words in plain, words
    assert str(tmp_path) not in card


def test_a_card_that_is_there_keeps_all_but_the_section(hub, subspace):
    subspace.push_to_hub("me/v", license="mit")
    card = hub.repos["me/v"].tree()["README.md"].decode()
    assert head_of(card)["license"] == "mit"
    mine = card.replace("\n# Safety subspace\n", "\n# Mine, and why\n", 1).replace("mit", "apache-2.0")
    hub.repos["me/v"].commit({**hub.repos["me/v"].tree(), "README.md": mine.encode()}, "by hand")
    subspace.push_to_hub("me/v")
    again = hub.repos["me/v"].tree()["README.md"].decode()
    assert again == mine
    assert again.count(BEGIN) == again.count(END) == 1
    hub.make("me/w", {"README.md": b"just words\n"})
    subspace.push_to_hub("me/w")
    own = hub.repos["me/w"].tree()["README.md"].decode()
    assert "just words" in own
    assert "safety-subspace" in head_of(own)["tags"]


def test_pushed_again_nothing_is_sent_twice(hub, subspace):
    first = subspace.push_to_hub("me/v")
    sent = sum(line.startswith("PUT") for line in hub.asked)
    assert subspace.push_to_hub("me/v") == first
    assert sum(line.startswith("PUT") for line in hub.asked) == sent == 1


def test_a_branch_is_made_and_a_pull_request_leaves_main_alone(hub, subspace):
    address = subspace.push_to_hub("me/v", revision="int8", commit_message="smaller")
    repo = hub.repos["me/v"]
    assert repo.branches["int8"] in address
    assert "tiny.subspace.safetensors" not in repo.tree()
    assert repo.messages[-1] == "smaller"
    address = subspace.push_to_hub("me/v", create_pr=True)
    assert repo.branches["refs/pr/1"] in address
    assert Subspace.from_pretrained("me/v@refs/pr/1").address == address
    assert "tiny.subspace.safetensors" not in repo.tree()


def test_a_hub_that_is_switched_off_is_told_before_any_work(hub, subspace, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    subspace.path.write_bytes(subspace.path.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(SubspaceError, match=r"cannot go to 'me/v': the Hub is switched off here \(HF_HUB_OFFLINE\)"):
        subspace.push_to_hub("me/v")
    assert hub.asked == []


@pytest.mark.parametrize("repo", ["v", "me/../v", "../v", "me/v/w", "me/v@main", "me/--v", "", "me /v", None])
def test_an_id_that_cannot_be_is_asked_of_nobody(hub, subspace, repo):
    with pytest.raises(SubspaceError, match="give the id of a repository, as 'org/name'"):
        subspace.push_to_hub(repo)
    assert hub.asked == []


def test_a_damaged_file_is_not_published(hub, subspace):
    subspace.path.write_bytes(subspace.path.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(SubspaceError, match="was changed: "):
        subspace.push_to_hub("me/v")
    assert hub.asked == []


def test_a_name_that_nobody_would_find_is_refused(hub, subspace, tmp_path):
    for name in ("V", "my file.safetensors", "model.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(subspace.path.read_bytes())
        with pytest.raises(SubspaceError, match=r"cannot have this name on the Hub: call it like 'model.subspace"):
            Subspace.load(tmp_path / name).push_to_hub("me/v")
    assert hub.asked == []


def test_without_a_login_or_the_right_to_write_nothing_is_there(hub, subspace, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SubspaceError, match=r"log in with a token that may write \(`hf auth login`"):
        subspace.push_to_hub("me/v")
    assert hub.asked == []
    for token, repo, says in (
        (READER, "me/v", "your token may not write there"),
        ("hf_old", "me/v", "the token is not accepted: log in anew"),
        ("hf_writer", "org/theirs", "your token may not write there"),
    ):
        with pytest.raises(SubspaceError, match=rf"'{repo}': {says}.*Nothing was committed"):
            subspace.push_to_hub(repo, token=token)
    hub.make("me/there")
    with pytest.raises(SubspaceError, match="your token may not write there"):
        subspace.push_to_hub("me/there", token=READER)
    assert list(hub.repos) == ["me/there"]
    assert hub.repos["me/there"].messages == ["initial commit"]


@pytest.mark.parametrize("fault", ["cut", 500])
@pytest.mark.parametrize("part", [("PUT", "/lfs/"), ("POST", "/commit/"), ("POST", "/preupload/")])
def test_an_upload_that_breaks_off_leaves_nothing_and_goes_on_when_repeated(hub, subspace, monkeypatch, part, fault):
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    hub.faults[part] = fault
    with pytest.raises(SubspaceError, match=r"did not go to 'me/v': .* Push again: all of it is one commit at the end"):
        subspace.push_to_hub("me/v")
    assert list(hub.repos["me/v"].tree()) == [".gitattributes"]
    hub.faults.clear()
    subspace.push_to_hub("me/v")
    assert sorted(hub.repos["me/v"].tree()) == [".gitattributes", "README.md", "tiny.subspace.safetensors"]


def test_a_repository_that_changed_meanwhile_is_told(hub, subspace):
    hub.make("me/v")
    hub.faults["POST", "/commit/"] = 412
    with pytest.raises(SubspaceError, match=r"it was changed meanwhile: push again. Nothing was committed"):
        subspace.push_to_hub("me/v")


def test_the_section_of_hub_checkpoints_has_the_command_and_a_compressed_one_its_exact_file(subspace, tmp_path):
    header = subspace.header
    header.aligned.update(source="org/chat", revision="a" * 40)
    header.unaligned.update(source="org/base", revision="b" * 40)
    text = subspace_section("v.safetensors", 10**7, header, "f", "me/v")
    assert f"safemerge build --aligned org/chat@{'a' * 40} --unaligned org/base@{'b' * 40} --target-modules " in text
    header.unaligned.update(source="| x\n``` y")
    text = subspace_section("v.safetensors", 10**7, header, "f", "me/v")
    assert "safemerge build" not in text
    assert "\\| x \\`\\`\\` y at b" in text
    small = compress_subspace(Subspace.load(subspace.path), tmp_path / "int8.safetensors", progress=False)
    assert "made from | tiny.subspace.safetensors" in subspace_section("s", 1, small.header, "f", "me/v")


def test_a_licence_is_stated_changed_and_left(hub, subspace):
    for licence, stated in ((None, None), ("mit", "mit"), ("other", "other"), (None, "other")):
        subspace.push_to_hub("me/v", license=licence)
        assert head_of(hub.repos["me/v"].tree()["README.md"].decode()).get("license") == stated


def test_a_head_that_the_hub_does_not_take_is_told_with_its_reason(hub, subspace):
    says = r"Invalid metadata in README.md; \"license\" must be one of mit, other. Nothing was committed"
    with pytest.raises(SubspaceError, match=says):
        subspace.push_to_hub("me/v", license="mine")
    assert list(hub.repos["me/v"].tree()) == [".gitattributes"]
