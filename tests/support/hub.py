"""A Hub on this machine: repositories in memory behind the routes that the real client asks, with faults on demand."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as client
import yaml

# May write to what is of `me`; may only read.
WRITER, READER = "hf_writer", "hf_reader"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """A repository: its commits, each a whole tree (path -> content), and which commit a branch is."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    private: bool = False
    gated: bool = False

    def commit(self, tree: dict[str, bytes], message: str, branch: str = "main") -> str:
        """Put a tree on a branch; return its commit."""
        text = f"{len(self.commits)} {message} {sorted((k, hashlib.sha1(v).hexdigest()) for k, v in tree.items())}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = tree, sha
        self.messages.append(message)
        return sha

    def tree(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch or a commit."""
        return self.commits[self.branches.get(revision, revision)]


class Server(ThreadingHTTPServer):
    """The stand-in. `asked`: every request; `faults`: (method, part of a path) -> status, code, or `cut` the line."""

    # A connection that the client keeps open is no reason to wait.
    daemon_threads, block_on_close = True, False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.faults: dict[tuple[str, str], Any] = {}

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT names."""
        return f"http://127.0.0.1:{self.server_port}"

    def make(self, name: str, files: dict[str, bytes] | None = None, **how: Any) -> Repo:
        """A repository with one commit."""
        repo = self.repos[name] = Repo(**how)
        repo.commit({".gitattributes": b"", **(files or {})}, "initial commit")
        return repo

    def wrote(self) -> list[str]:
        """What was asked that would change anything."""
        return [line for line in self.asked if not line.startswith(("GET", "HEAD"))]


class Answers(BaseHTTPRequestHandler):
    """One request: a method and a path, looked up among the routes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_args: Any) -> None:
        """Stay quiet."""

    def answer(self) -> None:
        """Find the route, unless a fault is due."""
        self.path, _, self.query = self.path.partition("?")
        self.server.asked.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for (method, part), fault in self.server.faults.items():
            if method == self.command and part in self.path:
                return self.fail(fault)
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, self.path)
            if match and method == self.command:
                return action(self, **match.groupdict())
        return self.reply(404, code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def fail(self, fault: Any) -> None:
        """A refusal, or the line breaks."""
        if fault == "cut":
            self.close_connection = True
            return None
        status, code = fault if isinstance(fault, tuple) else (fault, None)
        return self.reply(status, code=code)

    def reply(self, status: int, body: Any = b"", code: str | None = None, **headers: str) -> None:
        """Send an answer; a mapping as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers |= {"X-Error-Code": code} if code else {}
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def token(self) -> str:
        """Who asks."""
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def readable(self, repo: str) -> Repo | None:
        """The repository, or None after a refusal."""
        there = self.server.repos.get(repo)
        if there is None or (there.private and self.token != WRITER):
            self.reply(401 if not self.token else 404, code="RepoNotFound")
            return None
        if there.gated and self.token != WRITER:
            self.reply(403, code="GatedRepo")
            return None
        return there

    def writable(self, repo: str) -> bool:
        """Whether the token may write there; a refusal where not."""
        if self.token not in (WRITER, READER):
            self.reply(401, {"error": "Invalid credentials"})
        elif self.token == READER or not repo.startswith("me/"):
            self.reply(403, {"error": "Forbidden: you must use a write token"})
        else:
            return True
        return False

    def create(self) -> None:
        """POST /api/repos/create."""
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.writable(name):
            url = {"url": f"{self.server.endpoint}/{name}", "name": name}
            if name in self.server.repos:
                return self.reply(409, {"error": "You already created this model repo", **url})
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.server.make(name, private=private)
            return self.reply(200, url)
        return None

    def info(self, repo: str, revision: str | None = None) -> None:
        """GET /api/models/REPO[/revision/REVISION]."""
        if (there := self.readable(repo)) is not None:
            revision = (revision or "main").replace("%2F", "/")
            sha = there.branches.get(revision, revision)
            if sha not in there.commits:
                return self.reply(404, code="RevisionNotFound")
            files = [{"rfilename": name} for name in there.commits[sha]]
            return self.reply(200, {"id": repo, "sha": sha, "siblings": files, "private": there.private})
        return None

    def tree(self, repo: str, revision: str) -> None:
        """GET /api/models/REPO/tree/COMMIT."""
        if (there := self.readable(repo)) is not None:
            tree = there.tree(revision)
            entries = [
                {"type": "file", "path": n, "size": len(v), "oid": hashlib.sha1(v).hexdigest()} for n, v in tree.items()
            ]
            self.reply(200, entries)

    def branch(self, repo: str, revision: str) -> None:
        """POST /api/models/REPO/branch/BRANCH."""
        if self.writable(repo):
            there = self.server.repos[repo]
            if revision in there.branches:
                return self.reply(409, {"error": "exists"})
            there.branches[revision] = there.branches["main"]
            return self.reply(200, {})
        return None

    def check_yaml(self) -> None:
        """POST /api/validate-yaml: the head of a card."""
        head = json.loads(self.body)["content"].split("---\n")[1]
        try:
            licence = yaml.safe_load(head).get("license", "mit")
            errors = [] if licence in ("mit", "apache-2.0", "other") else ['"license" must be one of mit, other']
        except yaml.YAMLError as error:
            errors = [str(error)]
        if errors:
            return self.reply(400, {"errors": [{"message": one} for one in errors], "warnings": []})
        return self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        """POST /api/models/REPO/preupload/REVISION: which files are large."""
        if self.writable(repo):
            there = self.server.repos[repo].tree(revision)
            files = []
            for file in json.loads(self.body)["files"]:
                large = file["path"].endswith(".safetensors")
                old = there.get(file["path"])
                known = {} if old is None else {"oid": hashlib.sha256(old).hexdigest() if large else _git_hash(old)}
                mode = "lfs" if large else "regular"
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
            self.reply(200, {"files": files})

    def batch(self, repo: str) -> None:
        """POST /REPO.git/info/lfs/objects/batch: where to put which large file."""
        objects = []
        for one in json.loads(self.body)["objects"]:
            href = f"{self.server.endpoint}/lfs/{one['oid']}"
            actions = {} if one["oid"] in self.server.blobs else {"actions": {"upload": {"href": href}}}
            objects.append({**one, **actions})
        self.reply(200, {"objects": objects, "transfer": "basic"})

    def put(self, oid: str) -> None:
        """PUT /lfs/OID."""
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.blobs[oid] = self.body
        self.reply(200)

    def commit(self, repo: str, revision: str) -> None:
        """POST /api/models/REPO/commit/REVISION: all or nothing."""
        if not self.writable(repo):
            return None
        there, lines = self.server.repos[repo], [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", there.branches[revision]) != there.branches[revision]:
            return self.reply(412, {"error": "The branch was changed since"})
        tree = dict(there.tree(revision))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.server.blobs[value["oid"]]
        proposed = "create_pr=1" in self.query
        sha = there.commit(tree, header["summary"], "refs/pr/1" if proposed else revision)
        url = f"{self.server.endpoint}/{repo}"
        more = {"pullRequestUrl": f"{url}/discussions/1"} if proposed else {}
        return self.reply(200, {"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, **more})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        """GET and HEAD /REPO/resolve/REVISION/FILE."""
        if (there := self.readable(repo)) is not None:
            revision = revision.replace("%2F", "/")
            content = there.tree(revision).get(name)
            if content is None:
                return self.reply(404, code="EntryNotFound")
            sha = there.branches.get(revision, revision)
            etag = hashlib.sha256(content).hexdigest()
            return self.reply(200, content, X_Repo_Commit=sha, ETag=f'"{etag}"')
        return None


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", Answers.create),
    ("POST", "/api/validate-yaml", Answers.check_yaml),
    ("GET", f"/api/models/{REPO}", Answers.info),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>.+)", Answers.info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)", Answers.tree),
    ("POST", f"/api/models/{REPO}/branch/(?P<revision>.+)", Answers.branch),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>.+)", Answers.preupload),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>.+)", Answers.commit),
    ("POST", f"/{REPO}[.]git/info/lfs/objects/batch", Answers.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Answers.put),
    *((m, f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Answers.resolve) for m in ("GET", "HEAD")),
]


@contextlib.contextmanager
def hub_on(patch: Any, cache: Path) -> Any:
    """The server while it runs, and the client set to it, logged in to write; a cache of its own."""
    import transformers.utils.hub

    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        # What HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_CACHE set when the client is imported. Xet speaks to servers of
        # its own; without it the client uploads by the LFS protocol.
        patch.setattr(client, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(client, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(client, "HF_HUB_OFFLINE", False)
        patch.setattr(client, "HF_HUB_DISABLE_XET", True)
        patch.setattr(client, "HF_HUB_CACHE", str(cache))
        patch.setenv("HF_TOKEN", WRITER)
        # The trainers' client is made once a process, and keeps the address it was made with.
        patch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        yield server
        server.shutdown()
