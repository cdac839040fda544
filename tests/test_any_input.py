"""Whatever is given, by a hand, a file or a program: it works, or one of the package's own errors says why."""

import copy
import json
import os
import warnings
from contextlib import suppress
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from recipes.data import ncbi_disease_examples
from safemerge_callback import SafeMergeConfig, SafeMergeError, load_adapter
from safemerge_callback.adapters import save_adapter
from safemerge_callback.decision import Gate, MergePlan, Readings
from safemerge_callback.evaluation.acceptance import Thresholds, decide, read_thresholds
from safemerge_callback.evaluation.figures_file import read_figures
from safemerge_callback.evaluation.harness import check_tasks
from safemerge_callback.evaluation.judges import load_judge
from safemerge_callback.evaluation.loading import is_adapter
from safemerge_callback.evaluation.prompts import load_prompts
from safemerge_callback.evaluation.questions import load_questions
from safemerge_callback.evaluation.row_filter import load_training_rows
from safemerge_callback.evaluation.rows import load_rows
from safemerge_callback.offline import merge_adapters, undo_merge
from safemerge_callback.offline.merge_yaml import read_recipe
from safemerge_callback.offline.search import search_merge
from safemerge_callback.offline.search_trace import read_trace
from safemerge_callback.record import Journal, read_journal
from safemerge_callback.reports import read_history, summary, watch_run
from safemerge_callback.reports.page import render_page
from safemerge_callback.reports.plots import write_report
from safemerge_callback.reports.sweep_plot import check_picture
from safemerge_callback.reports.watch import Tail, frame
from safemerge_callback.subspace import Subspace, build_subspace, compress_subspace
from safemerge_callback.subspace.checkpoints.locate import locate
from safemerge_callback.training import LoopLog, SafetyEvalCallback
from safemerge_callback.training.probe.rules import Rollback, Stop, Trigger, as_rule

settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("any")

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), 1e308, float("inf"), True, 0]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
)
# Texts that could be paths, and such as no system takes.
PATHS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", ".", "..", "/", "~", "~nosuchuser/x", "a\0b", "x" * 300, "/" + "x/" * 3000, "\ud800", "/dev/zero"]
    ),
    st.sampled_from(
        ["org/name@", "@", "a@b@c", "harm:", "benign:#", "harm:/dev/zero", "x.csv", "harm:x.jsonl#\0", "pipe"]
    ),
    SCALARS.filter(lambda value: not isinstance(value, str)),
    st.lists(st.text(max_size=3), max_size=2),
)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder to work in, with a pipe that never ends, links in a circle and a file of each bad kind."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe")
    return tmp_path


# Nothing is told of it: the path is refused before.
ANY: Any = None
ROWS = [{"prompt": "a"}]
TAKERS = {
    "subspace": Subspace.load,
    "checkpoint": locate,
    "adapter": load_adapter,
    "model": is_adapter,
    "prompts": lambda path: load_prompts(path, 3),
    "rows": load_rows,
    "history": read_history,
    "journal read": read_journal,
    "journal": lambda path: Journal(path, enabled=False),
    "watch": lambda path: watch_run(path, once=True),
    "tail": lambda path: Tail(path).read(),
    "undo": undo_merge,
    "recipe": read_recipe,
    "config": SafeMergeConfig.from_yaml,
    "picture": check_picture,
    "report": lambda path: write_report(ANY, str(path) + ".nosuch"),
    "build": lambda path: build_subspace(path, aligned="circle", unaligned="pipe", progress=False),
    "build of": lambda path: build_subspace("o", aligned=path, unaligned=path, progress=False),
    "compress": lambda path: compress_subspace(path, "o", progress=False),
    "merge": lambda path: merge_adapters(path, path, path, "o"),
    "merge to": lambda path: merge_adapters("circle", "circle", "circle", path),
    "bake": lambda path: merge_adapters("circle", "circle", "circle", "o", bake=path),
    "questions": lambda path: load_questions(path, "rows"),
    "training rows": load_training_rows,
    "corpus": lambda path: ncbi_disease_examples("test", path),
    "trace": read_trace,
    "search": lambda path: search_merge(path, path, path, "o", task_rows=path, safety_rows=path),
    "search to": lambda path: search_merge("circle", "pipe", "circle", path, task_rows=ROWS, safety_rows=ROWS),
    "loop": lambda path: LoopLog(path, enabled=False),
    "thresholds": read_thresholds,
    "figures": read_figures,
}


@pytest.mark.parametrize("who", TAKERS)
@settings(max_examples=60)
@given(path=PATHS)
def test_any_text_as_any_path(alone, monkeypatch, who, path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # A file that is no journal may look like one that was cut short, which is told.
    with warnings.catch_warnings(action="ignore"), suppress(SafeMergeError):
        TAKERS[who](path)


@settings(max_examples=100)
@given(rows=st.lists(st.one_of(VALUES, st.dictionaries(st.sampled_from(["messages", "prompt", "completion"]), VALUES))))
def test_any_value_as_a_training_row(rows):
    with suppress(SafeMergeError):
        load_training_rows(rows)


@settings(max_examples=400)
@given(
    name=st.sampled_from([*(field.name for field in fields(SafeMergeConfig)), "preset", "combination_type"]),
    value=VALUES,
)
def test_any_value_as_any_setting(name, value):
    with suppress(SafeMergeError):
        config = SafeMergeConfig.from_dict({"subspace": "s", "safety_adapter": "a", name: value})
        json.dumps(config.to_dict())


@settings(max_examples=200)
@given(name=st.sampled_from([field.name for field in fields(Gate)]), value=VALUES)
def test_any_value_as_any_knob_of_a_gate(name, value):
    with suppress(SafeMergeError):
        str(Gate(**{name: value}))


@settings(max_examples=200)
@given(name=st.sampled_from([field.name for field in fields(Thresholds)]), value=VALUES)
def test_any_value_as_any_threshold(name, value):
    with suppress(SafeMergeError):
        Thresholds(**{name: value}).named()


FIGURE = {"measure": "a_refused", "kind": "harm", "n": 9, "value": 0.5, "low": 0.2, "high": 0.8, "unit": "share"}


@settings(max_examples=200)
@given(key=st.sampled_from([*FIGURE, "incoherent", "judge"]), value=VALUES)
def test_any_value_in_any_place_of_figures(alone, key, value):
    (alone / "eval.json").write_text(json.dumps({"figures": [FIGURE | {key: value}]}))
    limits = Thresholds(**{field.name: 0.5 for field in fields(Thresholds)})
    with suppress(SafeMergeError):
        figures = read_figures("eval.json")
        assert decide(figures, limits, figures).exit_code in (0, 1, 4, 5)


HOW = ("method", "space", "weights", "module_weights", "strength", "operator", "operator_rank", "density", "focal")


@settings(max_examples=200)
@given(name=st.sampled_from(HOW), value=VALUES)
def test_any_value_as_any_knob_of_a_merge(name, value):
    with suppress(SafeMergeError):
        MergePlan.decide(Readings(()), gate="all", **{name: value})


RULES = {
    Rollback: ("task", "eval_loss"),
    Trigger: ("below", "rearm", "cooldown", "measure"),
    Stop: ("below", "patience"),
}


@settings(max_examples=200)
@given(kind=st.sampled_from([*RULES]), value=VALUES, data=st.data())
def test_any_value_as_any_setting_of_a_rule(kind, value, data):
    name = data.draw(st.sampled_from(RULES[kind]))
    for given_ in (value, {"below": 0.5, name: value} if "below" in RULES[kind] else {name: value}):
        with suppress(SafeMergeError):
            as_rule(kind, given_)


ASKED = ("prompts", "benign", "every", "n", "judge", "benign_judge", "judge_seconds", "max_new_tokens", "batch_size")


@settings(max_examples=150)
@given(name=st.sampled_from([*ASKED, "rollback", "trigger", "stop", "journal", "template"]), value=VALUES)
def test_any_value_as_any_setting_of_a_probe(name, value):
    with suppress(SafeMergeError):
        SafetyEvalCallback(**{"prompts": {"a": ["w"]}, "benign": {"b": ["w"]}, "task": len, name: value})


@settings(max_examples=100)
@given(value=VALUES)
def test_any_value_as_a_judge_or_a_task(value):
    with suppress(SafeMergeError):
        load_judge(value)
    with suppress(SafeMergeError):
        check_tasks([], value if isinstance(value, str) else None)


MODULE = {"name": "layers.0.q", "cosine": 0.3, "null_cosine": 0.4, "update_norm": 1.0, "merge": True, "reason": "0.30"}
FIGURE = {"measure": "a", "kind": "harm", "n": 3, "value": 0.5, "low": 0.1, "high": 0.9, "incoherent": 0, "unjudged": 0}
ENTRIES = [
    {"kind": "start", "step": 0, "config": {"gate": "all"}, "versions": {}, "subspace": {}, "time": "now"},
    {
        "kind": "check",
        "step": 1,
        "gate": "threshold",
        "threshold": 0.35,
        "num_layers": None,
        "seconds": 0.1,
        "modules": [MODULE],
    },
    {
        "kind": "check",
        "step": 2,
        "gate": "calibrated",
        "threshold": 0.35,
        "z_threshold": -2.0,
        "num_layers": None,
        "seconds": 0.1,
        "modules": [{**MODULE, "null_std": 0.1, "signed_z": 1.0}],
    },
    {
        "kind": "check",
        "step": 2,
        "gate": "num_layers",
        "threshold": 0.35,
        "num_layers": 3,
        "seconds": 0.1,
        "modules": [MODULE],
    },
    {
        "kind": "merge",
        "step": 2,
        "method": "linear",
        "space": "delta",
        "weights": [0.8, 0.2],
        "seconds": 0.1,
        "modules": [{"name": "layers.0.q", "residual": 0.1, "change": 0.1, "task_weight": 0.8}],
    },
    {
        "kind": "probe",
        "step": 2,
        "when": "end",
        "seconds": 1.0,
        "mean_tokens": 3.0,
        "settings": {"n": 3},
        "measures": [FIGURE],
    },
    {"kind": "rollback", "step": 2, "reason": "cost", "modules": ["layers.0.q"]},
    {"kind": "undo", "step": 2, "modules": ["layers.0.q"]},
    {"kind": "trigger", "step": 2, "reason": "low"},
    {"kind": "error", "step": 2, "where": "here", "error": "this"},
    {"kind": "start", "step": 2, "config": {"gate": "all"}},
    {"kind": "end", "step": 2, "checks": 2, "merges": 1, "modules_merged": 1, "seconds": 0.3, "training_seconds": 3.0},
]


def places(value, path=()):
    """Every place in an entry, the entry itself among them."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*path, key))


def put(entry, path, value):
    """The entry with `value` at a place."""
    if not path:
        return value
    changed = copy.deepcopy(entry)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


def told(folder, lines):
    """All that is made of a journal, as far as the lines can be used."""
    path = folder / "safemerge.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="surrogatepass")
    with warnings.catch_warnings(action="ignore"):
        for show in (summary, render_page, lambda history: frame(history, path)):
            with suppress(SafeMergeError):
                show(read_history(path))
        with suppress(SafeMergeError):
            watch_run(path, once=True)


def test_a_journal_of_every_kind_of_entry_is_told(tmp_path):
    told(tmp_path, map(json.dumps, ENTRIES))
    assert "gate num_layers 3" in summary(read_history(tmp_path))


@settings(max_examples=300)
@given(index=st.integers(0, len(ENTRIES) - 1), value=VALUES, data=st.data())
def test_any_value_in_any_place_of_a_journal(tmp_path, index, value, data):
    path = data.draw(st.sampled_from([*places(ENTRIES[index])]))
    entries = [*ENTRIES[:index], put(ENTRIES[index], path, value), *ENTRIES[index + 1 :]]
    told(tmp_path, [json.dumps(entry) for entry in entries])


@settings(max_examples=100)
@given(lines=st.lists(st.one_of(VALUES.map(json.dumps), st.text(max_size=20)), max_size=4))
def test_any_lines_as_a_journal(tmp_path, lines):
    told(tmp_path, lines)


@settings(max_examples=150)
@given(
    name=st.sampled_from(
        ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "fan_in_fan_out"]
    ),
    value=st.one_of(
        VALUES, st.dictionaries(st.sampled_from(["q_proj", "(", "a{99999999999}", "(" * 200 + ")" * 200]), NUMBERS)
    ),
)
def test_any_value_in_an_adapters_config(tmp_path, name, value):
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "b", name: value}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
    tensors = {
        f"base_model.model.layers.0.q_proj.lora_{x}.weight": torch.ones(s) for x, s in (("A", (2, 4)), ("B", (4, 2)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    with suppress(SafeMergeError):
        save_adapter(tmp_path / "again", load_adapter(folder))
