"""`search_merge` on a tiny chat model: what it writes, that it is the merge it searched, and what it refuses."""

import filecmp
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from safemerge_callback.adapters import load_adapter
from safemerge_callback.cli import app
from safemerge_callback.errors import AdapterError, ConfigError
from safemerge_callback.evaluation.questions import load_questions
from safemerge_callback.offline import merge_adapters
from safemerge_callback.offline.candidates import clusters, is_equal, update_cosine
from safemerge_callback.offline.merge_yaml import read_recipe
from safemerge_callback.offline.output import TRACE
from safemerge_callback.offline.search import Opening, search_merge
from safemerge_callback.offline.search_trace import Trace, read_trace, trace_beside
from safemerge_callback.ops import LowRank
from safemerge_callback.signals.coefficients import SearchSettings
from safemerge_callback.signals.merge_problem import Evaluation
from tests.support.world import save_lora, write_checkpoints, write_subspace

TARGETS = ["q_proj", "v_proj"]
TASK = [{"prompt": f"{a} {b}", "completion": c} for a, b, c in ("abw", "cdx", "efy")]
SAFETY = [{"prompt": "g h", "response": "w0 w1 w2", "kind": "harm"}, {"prompt": "i", "response": "yes w3"}]
OPENING = Opening(dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, chat_tokenizer):
    """Two checkpoints, their subspace, a fine-tuned adapter and three others; `twin` is near `safety`."""
    from tests.conftest import _factory

    place = tmp_path_factory.mktemp("search")
    make = _factory("Llama", num_key_value_heads=4, vocab_size=64, pad_token_id=2, initializer_range=0.6)
    base = make(seed=1)
    write_checkpoints(place, base, noise=0.05, tokenizer=chat_tokenizer)
    write_subspace(place, "s.safetensors", TARGETS)

    def named(seed):
        model = make(seed=1)
        model.name_or_path = str(place / "aligned")
        return model

    for seed, (name, lora) in enumerate({"task": {}, "safety": {"r": 2}, "other": {"r": 2}}.items(), 5):
        save_lora(named, place / name, seed, TARGETS, task_type="CAUSAL_LM", **lora)
    twin = save_lora(named, place / "twin", 6, TARGETS, task_type="CAUSAL_LM", r=2)
    from safetensors.torch import save_file

    tensors = load_file(twin / "adapter_model.safetensors")
    save_file({k: t * 1.01 for k, t in tensors.items()}, twin / "adapter_model.safetensors", {"format": "pt"})
    return place


def searched(folder, output, *safety, task=TASK, safety_rows=SAFETY, more=None, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="safemerge: base models have different names")
        return search_merge(
            str(folder / "task"),
            [str(folder / name) for name in safety],
            folder / "s.safetensors",
            output,
            task_rows=task,
            safety_rows=safety_rows,
            settings=SearchSettings(**settings),
            opening=OPENING,
            **(more or {}),
        )


def updates(folder):
    return {n: one.low_rank(unit=1.0) for n, one in load_adapter(folder).factors.items()}


@pytest.mark.parametrize("safety", [(), ("safety",)])
@pytest.mark.parametrize("granularity", ["run", "module"])
def test_the_yaml_makes_the_same_merge_and_that_is_the_one_that_was_searched(folder, tmp_path, safety, granularity):
    more = {"method": "cat"} if safety else {}
    report = searched(folder, tmp_path / "out", *safety, granularity=granularity, share=3.0, more=more)
    assert report.learned.improved
    # `cat` and `pull` lose nothing: the adapter that was written costs what was searched.
    assert report.achieved.task + 3.0 * report.achieved.safety == pytest.approx(report.learned.after, abs=1e-4)
    recipe = read_recipe(tmp_path / "out" / "safemerge.yaml")
    parts = [recipe.pop(key, None) for key in ("finetuned", "safety", "subspace")]
    with warnings.catch_warnings(action="ignore"):
        merge_adapters(*parts, tmp_path / "again", **recipe)
    names = ["adapter_model.safetensors", "adapter_config.json"]
    assert filecmp.cmpfiles(tmp_path / "out", tmp_path / "again", names, shallow=False)[0] == names
    merged = updates(tmp_path / "out")
    parts = [updates(folder / name) for name in ("task", *safety)]
    for name, weights in report.learned.weights.items():
        wanted = sum(w * part[name].B @ part[name].A for w, part in zip(weights, parts, strict=False))
        assert torch.allclose(merged[name].B @ merged[name].A, wanted, atol=1e-5)


def test_the_trace_ends_in_the_folder_and_its_numbers_are_the_reports(folder, tmp_path):
    report = searched(folder, tmp_path / "out", "safety", granularity="block", share=3.0)
    about, trace = read_trace(tmp_path / "out" / TRACE)
    assert about["settings"]["granularity"] == "block"
    assert [one.key for one in trace] == [one.key for one in report.learned.trace]
    assert not trace_beside(tmp_path / "out").exists()
    text = str(report)
    assert "one λ: safety" in text
    assert "2 λ: safety" in text
    assert "as written" in text
    assert f"{len(trace)} evaluations" in text
    assert report.peak_bytes is None or f"{report.peak_bytes / 2**30:.2f} GiB at most" in text


@pytest.mark.parametrize("granularity", ["run", "module"])
def test_a_killed_search_goes_on_and_ends_as_one_that_was_not(folder, tmp_path, monkeypatch, granularity):
    whole = searched(folder, tmp_path / "whole", granularity=granularity)
    add, count = Trace.add, []

    def kill(self, evaluation):
        add(self, evaluation)
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trace, "add", kill)
    with pytest.raises(KeyboardInterrupt):
        searched(folder, tmp_path / "out", granularity=granularity)
    assert not (tmp_path / "out").exists()
    beside = trace_beside(tmp_path / "out")
    with beside.open("a") as file:
        file.write('{"stage": "cut sh')
    monkeypatch.setattr(Trace, "add", add)
    again = searched(folder, tmp_path / "out", granularity=granularity)
    assert again.resumed == 5
    assert again.learned.weights == whole.learned.weights
    assert again.learned.forward < whole.learned.forward
    assert filecmp.cmp(*(tmp_path / n / "adapter_model.safetensors" for n in ("whole", "out")), shallow=False)


@pytest.mark.parametrize("safety", [None, "safety"])
def test_the_rule_learned_finds_on_files_what_a_search_does(folder, tmp_path, safety):
    """On the same rows: a search reads 16 tokens of a response, a merge 8, and none is longer here."""
    settings = {"granularity": "module", "objective": "cross_entropy", "share": 3.0}
    task = [{"prompt": row["prompt"], "response": row["completion"]} for row in TASK]
    report = searched(folder, tmp_path / "out", *filter(None, [safety]), task=task, **settings)
    rows = {"task_rows": task, "safety_rows": SAFETY, "base": str(folder / "aligned")}
    with warnings.catch_warnings(action="ignore"):
        parts = [folder / "task", safety and folder / safety, folder / "s.safetensors", tmp_path / "merged"]
        plan = merge_adapters(*parts, learned=settings, **rows)
    for name, weights in report.learned.weights.items():
        assert plan.weights[name] == pytest.approx(weights, abs=0.02)


def test_a_trace_of_another_search_is_not_taken(folder, tmp_path):
    trace_beside(tmp_path / "out").write_text(json.dumps({"search": 1, "settings": {}, "rows": "x"}) + "\n")
    with pytest.raises(ConfigError, match=r"of another search, which differs in \['finetuned', 'others', 'rows'"):
        searched(folder, tmp_path / "out")
    trace_beside(tmp_path / "out").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="is no trace of a search"):
        searched(folder, tmp_path / "out")


def test_numbers_that_are_none_come_back_from_a_trace(tmp_path):
    trace = Trace(tmp_path / "t.jsonl", {"a": 1})
    one = Evaluation("s", (0.1, 1 / 3), 2, float("inf"), float("nan"), 0.5, (float("nan"), 1.0), 0.25)
    trace.add(one)
    (back,) = Trace(tmp_path / "t.jsonl", {"a": 1}).known
    assert back.key == one.key
    assert repr(back) == repr(one)


def test_where_nothing_is_better_the_adapter_is_returned_as_it_was(folder, tmp_path):
    report = searched(folder, tmp_path / "out", share=0.0)
    assert not report.learned.improved
    assert report.achieved is None
    assert "the fine-tuned adapter is returned as it was" in str(report)
    names = ["adapter_model.safetensors", "adapter_config.json"]
    assert filecmp.cmpfiles(folder / "task", tmp_path / "out", names, shallow=False)[0] == names
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, TRACE}


def test_of_adapters_near_to_one_another_one_is_merged_and_the_recipe_names_what_is_used(folder, tmp_path):
    report = searched(folder, tmp_path / "out", "safety", "twin", "other", share=3.0)
    labels = {step.label for step in report.learned.steps}
    assert len(labels & {"safety", "twin"}) == 1
    assert any("which is better alone, so it is not tried" in note for note in report.learned.notes)
    recipe = read_recipe(tmp_path / "out" / "safemerge.yaml")
    used = [step.label for step in report.learned.steps if step.merged]
    sources = recipe["safety"] if isinstance(recipe["safety"], list) else [recipe["safety"]]
    assert {source.rpartition("/")[2] for source in sources} == set(used)
    assert len(recipe["weights"]) == 1 + len(sources)


def test_an_adapter_that_is_the_fine_tuned_one_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="each is the fine-tuned adapter itself"):
        searched(folder, tmp_path / "out", "task")
    trace_beside(tmp_path / "out").unlink()
    report = searched(folder, tmp_path / "out", "task", "safety", share=3.0)
    assert any("task: it is the fine-tuned adapter itself" in note for note in report.learned.notes)
    assert [step.label for step in report.learned.steps] == ["safety"]


def test_prompts_without_responses_are_answered_by_their_references(folder, tmp_path):
    task, safety = ([{"prompt": row["prompt"]} for row in rows] for rows in (TASK, SAFETY))
    with pytest.warns(UserWarning, match="all 2 safety rows are of kind 'harm'"):
        report = searched(folder, tmp_path / "out", task=task, safety_rows=safety)
    assert (report.task_rows, report.safety_rows) == (3, 2)
    with pytest.raises(ConfigError, match="'cross_entropy' reads responses, and task rows have prompts without"):
        searched(folder, tmp_path / "other", task=task, objective="cross_entropy")


def test_questions_are_read_in_the_columns_of_training_sets():
    rows = load_questions(
        [
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]},
            {"prompt": "a", "response": "I'm sorry, but I cannot help with that."},
            {"prompt": "b", "completion": "yes", "kind": "harm", "system": "t"},
            {"instruction": "c", "output": "fine"},
        ],
        "rows",
    )
    assert [(row.prompt, row.response, row.kind, row.system) for row in rows] == [
        ("p", "", "harm", "s"),
        ("a", "I'm sorry, but I cannot help with that.", "harm", None),
        ("b", "yes", "harm", "t"),
        ("c", "fine", "benign", None),
    ]
    with pytest.raises(ConfigError, match="row 1 of the rows is 3"):
        load_questions([3], "rows")
    with pytest.raises(ConfigError, match="the rows has no rows"):
        load_questions([], "rows")


def test_clusters_are_by_the_cosine_of_the_updates():
    def update(*numbers):
        return {"m": LowRank(torch.tensor([[1.0, 0.0]]), torch.tensor([[x] for x in numbers]))}

    one, near, far, negative = update(1.0, 0.0), update(2.0, 0.1), update(0.0, 1.0), update(-1.0, 0.0)
    assert clusters([one, far, near, negative]) == [[0, 2], [1], [3]]
    assert update_cosine(one, negative) == pytest.approx(-1.0)
    assert update_cosine(one, update(0.0, 0.0)) == 0.0
    assert is_equal(one, update(1.0, 0.0))
    assert not is_equal(one, near)


def test_what_cannot_be_is_refused_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("safemerge_callback.offline.search.load_subject", load_subject_never)
    for more, words in (
        ({"method": "ties"}, "method 'ties' has another result"),
        ({"rows": 0}, "rows is 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            searched(folder, tmp_path / "out", more=more)
    with pytest.raises(ConfigError, match="is one of the inputs"):
        searched(folder, folder / "task")
    with pytest.raises(AdapterError, match="nosuch"):
        searched(folder, tmp_path / "out", "nosuch")


def load_subject_never(*_args, **_more):
    raise AssertionError("the model was loaded")


def test_the_command_searches_draws_the_front_and_exits_with_1_where_nothing_is_better(folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for name, rows in (("t.jsonl", TASK), ("r.jsonl", SAFETY)):
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["search", folder / "task", folder / "safety", "-s", folder / "s.safetensors", "--device", "cpu"]
    words += ["--task-rows", "t.jsonl", "--safety-rows", "r.jsonl", "--dtype", "float32"]

    def run(*more, code=0):
        result = CliRunner().invoke(app, [*map(str, words), *more])
        assert result.exit_code == code, result.output
        return result

    shown = run("-o", "out", "--share", "3", "--plot", "front.svg", "--granularity", "block").stdout
    assert "objective kl, granularity block, μ 3" in shown
    assert "out: written" in shown
    assert "as written" in (tmp_path / "front.svg").read_text()
    assert "returned as it was" in run("-o", "none", "--share", "0", code=1).stdout
    assert "is not empty" in run("-o", "out", code=2).stderr
    run("-o", "out", "--share", "3", "--force")
