"""A subspace is opened from a file, a folder, or a repository of the Hub, at one commit of it."""

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from safemerge_callback import Subspace
from safemerge_callback.errors import SubspaceError
from safemerge_callback.subspace import compress_subspace
from safemerge_callback.subspace.file_address import FileAddress, cached_file, find_file
from tests.support.hub import READER


@pytest.fixture
def content(world):
    return Path(world.subspace).read_bytes()


@pytest.fixture
def repo(hub, content):
    return hub.make("org/v", {"model.subspace.safetensors": content, "README.md": b"# V"})


def test_a_repository_opens_at_one_commit_and_is_fetched_once(hub, repo, world):
    opened = Subspace.from_pretrained("org/v")
    sha = repo.branches["main"]
    assert opened.address == opened.name == opened.source == f"org/v@{sha}/model.subspace.safetensors"
    local = Subspace.load(world.subspace)
    assert (opened.fingerprint, opened.modules) == (local.fingerprint, local.modules)
    name = next(iter(local.modules))
    assert torch.equal(opened.stack([name])[0], local.stack([name])[0])
    assert hub.wrote() == []
    Subspace.from_pretrained("org/v")
    fetches = [line.rpartition("/")[2] for line in hub.asked if line.startswith("GET /org")]
    assert fetches == ["model.subspace.safetensors"]


def test_a_revision_and_an_address_open_what_was_there_then(hub, repo, world, tmp_path):
    old = Subspace.from_pretrained("org/v")
    other = compress_subspace(world.subspace, tmp_path / "small.safetensors", progress=False)
    repo.branches["v1"] = repo.branches["main"]
    repo.commit({"model.subspace.safetensors": other.path.read_bytes()}, "another")
    assert Subspace.from_pretrained("org/v").compressed
    for source in ("org/v@v1", old.address, f"org/v@{repo.branches['v1']}"):
        assert Subspace.from_pretrained(source).fingerprint == old.fingerprint
    assert Subspace.from_pretrained("org/v", revision="v1").fingerprint == old.fingerprint
    with pytest.raises(SubspaceError, match=r"'org/v@v1': revision='main' is given too"):
        Subspace.from_pretrained("org/v@v1", revision="main")


def test_offline_the_cache_is_all_there_is(hub, repo, monkeypatch):
    online = Subspace.from_pretrained("org/v")
    asked = len(hub.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert Subspace.from_pretrained("org/v").address == online.address
    assert Subspace.from_pretrained(online.address).address == online.address
    with pytest.raises(SubspaceError, match=r"'org/w' is no file here and could not be fetched .*offline"):
        Subspace.from_pretrained("org/w")
    assert cached_file(online.address) == online.path
    for source in ("org/v", f"org/v@{'0' * 40}/x.safetensors", str(online.path), "runs/x.safetensors"):
        assert cached_file(source) is None
    assert len(hub.asked) == asked


def test_a_file_and_a_folder_open_as_they_are(hub, content, tmp_path, monkeypatch):
    (tmp_path / "org" / "v").mkdir(parents=True)
    (tmp_path / "org" / "v" / "my.safetensors").write_bytes(content)
    (tmp_path / "org" / "v" / "model-00001-of-00002.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for source in ("org/v", Path("org/v/my.safetensors")):
        assert find_file(source) == FileAddress(Path("org/v/my.safetensors"))
        opened = Subspace.from_pretrained(source)
        assert (opened.address, opened.name) == (None, "my.safetensors")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["README.md", "model.safetensors"], "has no subspace file, only '.gitattributes', 'README.md', 'model.safet"),
        (["adapter_model.safetensors", "adapter_config.json"], "has no subspace file"),
        (["sub/deep.safetensors"], "has no subspace file"),
        (["a.safetensors", "b.safetensors"], r"has 2 .* \('a.safetensors', 'b.safetensors'\): name .* org/v@main/FILE"),
        (["only.safetensors"], "'org/v@[0-9a-f]{40}/only.safetensors' is corrupt, cut short, or no safetensors file"),
        (["pickled.bin", ".hidden.safetensors"], "has no subspace file"),
    ],
)
def test_a_repository_without_exactly_one_is_refused(hub, files, says):
    hub.make("org/v", dict.fromkeys(files, b"nothing"))
    with pytest.raises(SubspaceError, match=says):
        Subspace.from_pretrained("org/v")


def test_a_file_that_is_no_subspace_is_named_by_its_address(hub, tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    hub.make("org/v", {"x.safetensors": (tmp_path / "x.safetensors").read_bytes()})
    with pytest.raises(SubspaceError, match=r"'org/v@\w{40}/x.safetensors' is not a safety-subspace file"):
        Subspace.from_pretrained("org/v")


def test_one_of_several_is_named(hub, content):
    hub.make("org/v", {"a.safetensors": content, "b.safetensors": b"nothing"})
    assert Subspace.from_pretrained("org/v@main/a.safetensors").name.endswith("/a.safetensors")
    with pytest.raises(SubspaceError, match=r"has no 'c.safetensors', only '.gitattributes', 'a.safetensors'"):
        Subspace.from_pretrained("org/v@main/c.safetensors")


def test_what_the_hub_refuses_is_one_sentence(hub, repo, monkeypatch):
    hub.make("org/closed", gated=True)
    hub.make("org/mine", private=True)
    monkeypatch.setenv("HF_TOKEN", READER)
    for source, says in {
        "org/closed": "subspace 'org/closed' is gated: accept its terms on its page",
        "org/mine": "subspace 'org/mine' is no file here and no model on the Hub, or a private one",
        "org/absent": "subspace 'org/absent' is no file here and no model on the Hub, or a private one",
        "org/v@nowhere": "subspace 'org/v' has no revision 'nowhere' on the Hub",
    }.items():
        with pytest.raises(SubspaceError, match=says):
            Subspace.from_pretrained(source)


def test_a_line_that_breaks_is_one_sentence(hub, repo, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    hub.faults["HEAD", "resolve"] = 503
    with pytest.raises(SubspaceError, match=r"'org/v': model.subspace.safetensors could not be fetched from the Hub"):
        Subspace.from_pretrained("org/v")


@pytest.mark.parametrize(
    "source",
    ["lost.safetensors", "runs/lost.safetensors", "no", "../v", "org/../v", "org/v@../../etc", "a b/c", "/v/w"],
)
def test_what_is_neither_a_file_nor_an_id_is_asked_of_nobody(hub, source):
    with pytest.raises(SubspaceError, match="no such file, and not a Hub id such as 'org/name'"):
        Subspace.from_pretrained(source)
    assert hub.asked == []


def test_the_exact_file_is_fetched_when_a_decision_needs_it(hub, content, world, tmp_path):
    (tmp_path / "exact.safetensors").write_bytes(content)
    small = compress_subspace(tmp_path / "exact.safetensors", tmp_path / "int8.safetensors", progress=False)
    both = {"exact.safetensors": content, "int8.safetensors": small.path.read_bytes()}
    hub.make("org/v", both)
    opened = Subspace.from_pretrained("org/v@main/int8.safetensors")
    assert not any("exact" in line for line in hub.asked)
    assert opened.exact().fingerprint == Subspace.load(world.subspace).fingerprint
    hub.make("org/small", {"int8.safetensors": both["int8.safetensors"]})
    with pytest.raises(SubspaceError, match=r"has no 'exact.safetensors', only"):
        Subspace.from_pretrained("org/small").exact()


@pytest.mark.parametrize("name", ["../exact.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", ".x", ""])
def test_a_header_leads_nowhere_else(world, tmp_path, name):
    small = compress_subspace(world.subspace, tmp_path / "int8.safetensors", progress=False)
    small.header.exact["file"] = name
    with pytest.raises(SubspaceError, match=r"names the file .*: a plain name is allowed"):
        small.exact()
