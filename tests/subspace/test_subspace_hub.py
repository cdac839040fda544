"""A checkpoint on the Hub, read by the real client from a server on this machine that answers as the Hub does."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from safemerge_callback.errors import SubspaceError
from safemerge_callback.io.hub import find_commit
from safemerge_callback.subspace import CheckpointShards, build_subspace
from safemerge_callback.subspace.checkpoints import hub

SHA, OLD = "a" * 40, "b" * 40


class Answers(BaseHTTPRequestHandler):
    """The three routes that are asked for, and the Hub's own error codes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_args):
        """Stay quiet."""

    def do_GET(self):
        span = self.headers.get("Range")
        self.server.asked.append((self.path, span))
        api = re.fullmatch(r"/api/models/([\w-]+/[\w-]+)(?:/revision/(.+))?", self.path)
        file = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/([\w.]+)/(.+)", self.path)
        if self.server.faults:
            self.fail(self.server.faults.pop())
        elif api:
            self.tell(*api.groups())
        elif file:
            self.send(self.server.root / file[1].replace("/", "--") / file[2] / file[3], span)
        else:
            self.reply(404, code="EntryNotFound")

    def fail(self, fault):
        if isinstance(fault, int):
            return self.reply(fault)
        self.send_response(206)
        self.send_header("Content-Range", "bytes 0-999/123456789")
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"cut")
        self.close_connection = True
        return None

    def tell(self, repo, revision):
        name = repo.partition("/")[2]
        codes = {"closed": (403, "GatedRepo"), "absent": (401, "RepoNotFound"), "broken": (500, None)}
        if name in codes:
            return self.reply(codes[name][0], code=codes[name][1])
        commit = {None: SHA, "main": SHA, "old": OLD}.get(revision, revision)
        folder = self.server.root / repo.replace("/", "--") / commit
        if not folder.is_dir():
            return self.reply(404, code="RevisionNotFound")
        files = [{"rfilename": path.relative_to(folder).as_posix()} for path in folder.rglob("*") if path.is_file()]
        return self.reply(200, json.dumps({"id": repo, "sha": commit, "siblings": files}).encode())

    def send(self, path, span):
        if "gated" in str(path):
            return self.reply(403, code="GatedRepo")
        data = path.read_bytes()
        if not span or self.server.without_ranges:
            return self.reply(200, data)
        first, last = map(int, span.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        return self.reply(206, part, {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"})

    def reply(self, status, body=b"", headers=None, code=None):
        self.send_response(status)
        for key, value in {**(headers or {}), **({"X-Error-Code": code} if code else {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(tmp_path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        running.root, running.asked, running.faults, running.without_ranges = tmp_path / "hub", [], [], False
        threading.Thread(target=running.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{running.server_port}"
        # What the environment variables HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_CACHE set when the client is imported.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running
        running.shutdown()


def put(folder, model, shard_size="20KB"):
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def weights(model):
    return {n.removeprefix("model."): m.weight.detach() for n, m in model.named_modules() if hasattr(m, "in_features")}


def test_only_headers_and_the_wanted_tensor_are_fetched(server, tiny_llama, tmp_path):
    model = put(server.root / "org--chat" / SHA, tiny_llama())
    shards = CheckpointShards.open("org/chat")
    opening = len(server.asked)
    for name, weight in weights(model).items():
        assert torch.equal(shards.read(name), weight)
    spans = [span for _, span in server.asked[opening:]]
    assert all(spans)
    fetched = sum(int(last) - int(first) + 1 for first, last in (s.removeprefix("bytes=").split("-") for s in spans))
    assert fetched == sum(weight.numel() * 4 for weight in weights(model).values())
    assert not (tmp_path / "cache").exists()
    local = CheckpointShards.open(server.root / "org--chat" / SHA).fingerprint()
    assert shards.fingerprint() == {**local, "source": "org/chat", "revision": SHA}


def test_a_subspace_is_built_from_two_revisions_without_a_disk(server, tiny_llama, tmp_path):
    after, before = (
        put(server.root / "org--chat" / SHA, tiny_llama()),
        put(server.root / "org--chat" / OLD, tiny_llama(1)),
    )
    subspace = build_subspace(tmp_path / "V", aligned="org/chat", unaligned="org/chat@old", progress=False)
    for name in subspace.modules:
        assert torch.equal(subspace.stack([name])[0], weights(after)[name] - weights(before)[name])
    assert len(subspace.modules) == 14
    assert CheckpointShards.open("org/chat", revision="old").fingerprint()["revision"] == OLD
    with pytest.raises(SubspaceError, match="revision='main' is given too"):
        CheckpointShards.open("org/chat@old", revision="main")


def test_large_tensors_and_large_headers_come_in_parts(server, tiny_llama, monkeypatch):
    model = put(server.root / "org--chat" / SHA, tiny_llama(), "1GB")
    monkeypatch.setattr(hub, "CHUNK", 1000)
    monkeypatch.setattr(hub, "_FIRST", 64)
    shards = CheckpointShards.open("org/chat")
    for name, weight in weights(model).items():
        assert torch.equal(shards.read(name), weight)


def test_a_part_of_a_stacked_tensor_is_all_that_is_fetched(server, tmp_path):
    stacked = torch.randn(3, 8, 4).bfloat16()
    (server.root / "org--moe" / SHA).mkdir(parents=True)
    key = "model.layers.0.mlp.experts.down_proj"
    save_file({key: stacked, "model.norm.weight": torch.ones(4)}, server.root / "org--moe" / SHA / "model.safetensors")
    shards = CheckpointShards.open("org/moe")
    assert torch.equal(shards.read("layers.0.mlp.experts.1.down_proj"), stacked[1])
    first, last = map(int, server.asked[-1][1].removeprefix("bytes=").split("-"))
    assert last - first + 1 == 8 * 4 * 2


def cached(tmp_path, model, commit=SHA):
    folder = tmp_path / "cache" / "models--org--chat"
    put(folder / "snapshots" / commit, model)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


def test_the_cache_is_used_where_it_has_all_of_the_commit(server, tiny_llama, tmp_path):
    put(server.root / "org--chat" / SHA, tiny_llama())
    folder = cached(tmp_path, tiny_llama())
    shards = CheckpointShards.open("org/chat")
    shards.read("layers.0.mlp.up_proj")
    assert shards.fingerprint()["revision"] == SHA
    assert [path for path, _ in server.asked] == ["/api/models/org/chat"]
    next(folder.glob("model-00002*")).unlink()
    model = tiny_llama()
    assert torch.equal(CheckpointShards.open("org/chat").read("lm_head"), model.lm_head.weight)
    assert any("resolve" in path for path, _ in server.asked)


def test_an_older_commit_in_the_cache_is_not_taken_for_the_newest(server, tiny_llama, tmp_path):
    cached(tmp_path, tiny_llama(1), commit=OLD)
    model = put(server.root / "org--chat" / SHA, tiny_llama())
    shards = CheckpointShards.open("org/chat")
    assert shards.fingerprint()["revision"] == SHA
    assert torch.equal(shards.read("lm_head"), model.lm_head.weight)


def test_offline_the_cache_is_all_there_is(server, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = tiny_llama()
    folder = cached(tmp_path, model)
    assert torch.equal(CheckpointShards.open("org/chat").read("lm_head"), model.lm_head.weight)
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(SubspaceError, match="shards are missing, first 'model-00002"):
        CheckpointShards.open("org/chat")
    with pytest.raises(SubspaceError, match=r"'org/other' is no folder here and could not be fetched.*offline"):
        CheckpointShards.open("org/other")
    assert server.asked == []


@pytest.mark.parametrize("fault", [503, "cut"])
def test_a_fault_on_the_way_is_tried_again(server, tiny_llama, fault):
    model = put(server.root / "org--chat" / SHA, tiny_llama(), "1GB")
    shards = CheckpointShards.open("org/chat")
    server.faults.append(fault)
    assert torch.equal(shards.read("lm_head"), model.lm_head.weight)


def test_a_header_that_is_cut_on_the_way_is_fetched_again(server, tiny_llama):
    put(server.root / "org--chat" / SHA, tiny_llama(), "1GB")
    file = hub.HubFolder("org/chat", find_commit("org/chat", None, "checkpoint", error=SubspaceError)).shard(
        "model.safetensors"
    )
    server.faults.append("cut")
    assert file.tensors() == CheckpointShards.open("org/chat").located.files[0].tensors()


def test_a_server_that_stays_down_is_named(server, tiny_llama, monkeypatch):
    put(server.root / "org--chat" / SHA, tiny_llama(), "1GB")
    shards = CheckpointShards.open("org/chat")
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    server.faults.extend([503] * 20)
    with pytest.raises(SubspaceError, match=r"'org/chat' could not be fetched from the Hub: .*503"):
        shards.read("lm_head")


def test_the_environment_names_the_server(server, tiny_llama, tmp_path):
    model = put(server.root / "org--chat" / SHA, tiny_llama())
    code = (
        "from safemerge_callback.subspace import CheckpointShards\n"
        "print(float(CheckpointShards.open('org/chat').read('lm_head').double().sum()))"
    )
    here = {"HF_ENDPOINT": huggingface_hub.constants.ENDPOINT, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **here}, capture_output=True, check=True)
    assert float(done.stdout) == float(model.lm_head.weight.detach().double().sum())


def test_a_second_copy_of_the_weights_is_left_where_it_is(server):
    folder = server.root / "org--chat" / SHA
    (folder / "original").mkdir(parents=True)
    for name in ("weights", "consolidated", "original/other"):
        save_file({f"layers.0.{name[:7]}.weight": torch.zeros(2, 3)}, folder / f"{name}.safetensors")
    assert list(CheckpointShards.open("org/chat").names) == ["layers.0.weights"]


def leave_only(server, name, content=b""):
    folder = server.root / "org--other" / SHA
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("org/gated", "'org/gated' is gated: accept its terms"),
        ("org/closed", "'org/closed' is gated: accept its terms"),
        ("org/absent", "'org/absent' is no folder here and no model on the Hub, or a private one"),
        ("org/chat@nowhere", "'org/chat' has no revision 'nowhere' on the Hub"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(server, tiny_llama, source, says):
    for repo in ("org--chat", "org--gated"):
        put(server.root / repo / SHA, tiny_llama())
    with pytest.raises(SubspaceError, match=says):
        CheckpointShards.open(source)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model-Q4_K_M.gguf"])
def test_a_model_without_safetensors_is_refused_and_nothing_of_it_fetched(server, file):
    leave_only(server, file)
    with pytest.raises(SubspaceError, match=f"'org/other' has no safetensors weights, only {file}: pickle and GGUF"):
        CheckpointShards.open("org/other")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1", (90).to_bytes(8, "little") + b"x" * 99]
)
def test_a_damaged_file_on_the_hub_is_named(server, content):
    leave_only(server, "model.safetensors", content)
    with pytest.raises(SubspaceError, match=r"'model.safetensors' is not a readable safetensors file"):
        CheckpointShards.open("org/other")


def test_a_file_cut_short_on_the_hub_is_named(server, tiny_llama):
    put(server.root / "org--chat" / SHA, tiny_llama(), "1GB")
    path = server.root / "org--chat" / SHA / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SubspaceError, match=r"'model.safetensors' is not a readable .* lies outside the file"):
        CheckpointShards.open("org/chat")


def test_a_file_that_became_shorter_is_named(server, tiny_llama):
    put(server.root / "org--chat" / SHA, tiny_llama(), "1GB")
    shards = CheckpointShards.open("org/chat")
    path = server.root / "org--chat" / SHA / "model.safetensors"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(SubspaceError, match=r"'model.safetensors' is not a readable .* bytes came from the Hub"):
        shards.read("layers.1.mlp.up_proj")


def test_a_server_that_gives_no_parts_is_not_asked_for_the_whole(server, tiny_llama):
    put(server.root / "org--chat" / SHA, tiny_llama())
    server.without_ranges = True
    with pytest.raises(SubspaceError, match="gives no parts of files"):
        CheckpointShards.open("org/chat")


def test_a_hub_out_of_reach_is_one_sentence(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SubspaceError, match="'org/chat' is no folder here and could not be fetched from the Hub"):
        CheckpointShards.open("org/chat")
