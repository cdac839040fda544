"""What is read from YAML and JSON: as the libraries read it, but for a key that is given twice."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from method_comparison.grid import load_grid
from recipes.finetune import parse_finetune
from safemerge_callback import SafeMergeConfig
from safemerge_callback.errors import ConfigError, SubspaceError
from safemerge_callback.evaluation.prompts.tables import read_rows
from safemerge_callback.integrations.ms_swift import config_of
from safemerge_callback.io.documents import parse_json, parse_yaml, read_json, read_text, read_yaml
from safemerge_callback.offline.merge_yaml import read_recipe

ROOT = Path(__file__).parents[2]
YAMLS = sorted(p for folder in ("configs", "method_comparison/grids") for p in (ROOT / folder).rglob("*.yaml"))
TWICE = "method: linear\nevery: 10\nmethod: ties\n"


def _ms_swift(path: Path) -> Any:
    return config_of({"SAFEMERGE_SUBSPACE": "s", "SAFEMERGE_MODULE_WEIGHTS": '{"v_proj": [1, 0], "v_proj": [0, 1]}'})


READERS: dict[str, Callable[[Path], Any]] = {
    "callback": SafeMergeConfig.from_yaml,
    "merge --config": read_recipe,
    "grid": load_grid,
    "recipe": lambda path: parse_finetune(["--config", str(path)]),
    "prompts": lambda path: read_rows(path.rename(path.with_suffix(".prompt"))),
    "ms-swift": _ms_swift,
    "module_weights": lambda _: SafeMergeConfig("s", "a", module_weights='{"q": [1.0, 0.1], "q": [0.9, 0.1]}'),
}


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for reader, text, content in (
        (read_text, "a\ufeffb\r\n", "a\ufeffb\r\n"),
        (read_json, '{"a": 1}', {"a": 1}),
        (read_yaml, "a: 1", {"a": 1}),
    ):
        path.write_text(text, encoding="utf-8-sig", newline="")
        assert reader(path, "x") == content


@pytest.mark.parametrize("who", READERS)
def test_every_reader_refuses_a_key_given_twice(tmp_path: Path, who: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(TWICE)
    with pytest.raises(ConfigError, match="gives the key") as refused:
        READERS[who](path)
    assert "twice" in str(refused.value)
    assert "cannot be read" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (TWICE, "'method' twice, in lines 1 and 3"),
        ("a:\n- {b: 1, c: 2, b: 3}\n", "'b' twice, in lines 2 and 2"),
        ("1: a\n1.0: b\n", "twice, in lines 1 and 2"),
        ("on: a\nyes: b\n", "True twice, in lines 1 and 2"),
        ("x: &x {<<: {a: 1}, a: 2}\ny: {<<: *x, a: 3, a: 4}\n", "'a' twice, in lines 2 and 2"),
    ],
)
def test_a_yaml_key_given_twice_is_named_with_its_lines(text: str, where: str) -> None:
    with pytest.raises(ConfigError, match=f"^the file gives the key .*{where}"):
        parse_yaml(text, "the file")


def test_all_else_is_as_the_libraries_read_it(tmp_path: Path) -> None:
    """Merge keys that are overridden, several of them, nested anchors, and every YAML of this repository."""
    texts = [
        "t: {deep: {x: &x {<<: &y {a: 1, b: 2}, a: 3}}}\nb: {<<: *x, a: 4}\nc: {<<: [*x, *y], z: 1}\n",
        "a: &a {k: 1}\nb: &b {l: 2}\nc:\n  <<: *a\n  <<: *b\n  k: 5\n",
        "",
        *(path.read_text(encoding="utf-8") for path in YAMLS),
    ]
    assert len(YAMLS) > 40
    for text in texts:
        assert parse_yaml(text, "it") == yaml.safe_load(text)
    file = tmp_path / "x"
    file.write_text(json.dumps({"a": [{"b": 1}, {"b": 2}]}))
    assert read_json(file, "it") == read_yaml(file, "it") == {"a": [{"b": 1}, {"b": 2}]}
    with pytest.raises(ConfigError, match="it gives the key 'b' twice"):
        parse_json('{"a": {"b": 1, "b": 1}}', "it")


def test_yaml_runs_nothing() -> None:
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        parse_yaml("a: !!python/object/apply:os.getcwd []", "it")


NESTED = b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12))
MERGED = b"".join(b"a%d: &a%d {<<: [*a%d, *a%d]}\n" % (i, i, i - 1, i - 1) for i in range(1, 40))
UNREADABLE = {
    "no UTF-8": (b"a: \xff\xfe", "cannot be read: .*codec can't decode"),
    "too deep": (b"[" * 100_000, "cannot be read: it is nested too deep"),
    "closed, and too deep": (b"[" * 5000 + b"]" * 5000, "cannot be read: it is nested too deep"),
    "unclosed": (b'{"a": [', "is no (YAML|JSON): "),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read: "),
}
UNREADABLE_YAML = {
    "a number that no float holds": (b"a: 0x" + b"f" * 5000, "past what a float can hold"),
    "a date that is none": (b"a: 2024-13-45", "month"),
    "a key that is a list": (b"? [a]\n: b", "unhashable key"),
    "anchors in anchors": (b"a0: &a0 [x]\n" + NESTED, "more than 1,000,000 values"),
    "merged in merged": (b"a0: &a0 {x: 1}\n" + MERGED, "more than 1,000,000 values"),
    "an anchor that holds itself": (b"a: &a [*a]", "holds itself"),
}


@pytest.mark.parametrize(
    ("reader", "case"),
    [(read_yaml, name) for name in {**UNREADABLE, **UNREADABLE_YAML}] + [(read_json, name) for name in UNREADABLE],
)
def test_what_cannot_be_read_is_refused_with_who_and_why(tmp_path: Path, reader: Callable[..., Any], case: str) -> None:
    data, words = {**UNREADABLE, **UNREADABLE_YAML}[case]
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(SubspaceError, match=rf"^the file .*{words}.*Fetch it again$") as refused:
        reader(tmp_path / "x", "the file", error=SubspaceError, advice="Fetch it again")
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("reader", [read_yaml, read_json, read_text])
@pytest.mark.parametrize(
    ("name", "words"),
    [("pipe", "no regular file"), ("giant", "more than"), (".", "folder"), ("circle", "links"), ("no", "no such file")],
)
def test_only_regular_files_of_some_size_are_read(
    tmp_path: Path, reader: Callable[..., Any], name: str, words: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "giant").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(ConfigError, match=words):
        reader(tmp_path / name, "the file")
    with pytest.raises(ConfigError, match="no regular file"):
        reader("/dev/zero", "the file")


@given(st.binary(max_size=200))
def test_any_bytes_are_values_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    for reader in (read_yaml, read_json):
        with suppress(ConfigError):
            reader(path, "the file")


@given(st.text(alphabet="ab:-[]{}&*<!|>?#'\"\n\t 0123456789.ex_", max_size=60))
def test_any_text_is_values_or_refused(text: str) -> None:
    for parse in (parse_yaml, parse_json):
        with suppress(ConfigError):
            parse(text, "the text")
