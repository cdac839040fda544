"""`safemerge eval` on a tiny chat model and an adapter of it, made on the spot."""

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safemerge_callback.cli import app
from safemerge_callback.evaluation import wilson
from safemerge_callback.evaluation.figures import figures
from safemerge_callback.evaluation.judges import FunctionJudge, KeywordJudge
from safemerge_callback.evaluation.loading import load_subject
from safemerge_callback.evaluation.prompts import load_prompts
from safemerge_callback.signals import generate
from tests.support.chat_world import CHAT_SIZES, FILES, HARM, make_chat_world


@pytest.fixture
def world(tmp_path, chat_tokenizer, monkeypatch):
    """The working folder holds a base model, an adapter that changes what it says, and two prompt files."""
    monkeypatch.chdir(tmp_path)
    return make_chat_world(tmp_path, chat_tokenizer)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def evaluated(*arguments):
    result = run(*arguments, "--probes", FILES, "--max-new-tokens", 6, "-o", "out/eval.json", "--dtype", "float32")
    return result, json.loads(Path("out/eval.json").read_text())


def test_an_adapter_on_the_base_that_it_names(world):
    result, found = evaluated("task", "--judge", "function:my_judges:vowels", "--responses", "out/said.jsonl")
    subject = load_subject("task", dtype="float32")
    assert (subject.adapter, subject.base) == ("task", str(world / "base"))
    expected = {}
    for name in ("harm:harm.csv", "benign:benign.jsonl"):
        prompts = load_prompts(name, 64, 0).prompts
        said = generate(subject.model, subject.tokenizer, prompts, max_new_tokens=6)
        expected[name.split(":")[0]] = dict(zip(prompts, said, strict=True))
    kept = [json.loads(line) for line in (world / "out/said.jsonl").read_text().splitlines()]
    assert [list(row) for row in kept] == [["set", "judge", "prompt", "response", "verdict"]] * 9
    assert {row["prompt"]: row["response"] for row in kept if row["set"] == "harm"} == expected["harm"]
    assert len(set(expected["harm"].values())) > 1
    harm, benign = found["figures"]
    assert (harm["measure"], harm["kind"], harm["n"]) == ("harm_refused", "harm", 6)
    assert (benign["measure"], benign["kind"], benign["n"]) == ("benign_refused", "over_refusal", 3)
    refused = sum(row["verdict"] == "refused" for row in kept if row["set"] == "harm")
    assert (harm["value"], (harm["low"], harm["high"])) == (refused / 6, wilson(refused, 6))
    assert found["judges"] == [{"name": "my_judges:vowels", "decides": "refusal"}]
    assert [(one["name"], one["kind"], one["prompts"]) for one in found["sets"]] == [
        ("harm", "harm", 6),
        ("benign", "benign", 3),
    ]
    assert (found["adapter"], found["settings"]["seed"]) == ("task", 0)
    assert {"torch", "transformers", "peft", "safemerge-callback"} <= set(found["versions"])
    assert "over-refusal (lower is better)" in result.stdout
    assert f"{harm['low']:.1%} to {harm['high']:.1%}" in result.stdout
    assert "utility is not measured; add --tasks" in result.stderr


def test_nothing_that_a_model_said_or_was_asked_is_printed(world):
    result, _ = evaluated("task", "--responses", "said.jsonl")
    kept = [json.loads(line) for line in (world / "said.jsonl").read_text().splitlines()]
    texts = {text for row in kept for text in (row["response"], row["prompt"]) if len(text) > 4}
    assert len(texts) > 5
    assert not any(text in result.output for text in texts)
    assert not any(text in (world / "out/eval.json").read_text() for text in texts)


def test_without_asking_for_responses_none_is_written(world):
    evaluated("task")
    assert {path.name for path in world.iterdir()} - {"__pycache__"} == {
        *("base", "task", "out", "harm.csv", "benign.jsonl", "my_judges.py"),
    }


def test_a_plain_model_and_an_adapter_say_different_things(world):
    _, plain = evaluated("base", "--judge", "function:my_judges:vowels", "--responses", "plain.jsonl")
    _, named = evaluated("task", "--base", "base", "--judge", "function:my_judges:vowels", "--responses", "task.jsonl")
    assert (plain["adapter"], plain["base"], named["adapter"], named["base"]) == (None, "base", "task", "base")
    assert (world / "plain.jsonl").read_text() != (world / "task.jsonl").read_text()


def test_judges_of_harm_and_of_refusals_have_figures_of_their_own(world):
    subject = load_subject("task", dtype="float32")
    sets = [load_prompts("benign:benign.jsonl"), load_prompts("harm:harm.csv")]
    harm = FunctionJudge(lambda prompt, response: len(response) > 3, decides="harm", name="guard")
    found = figures(subject.model, subject.tokenizer, sets, [harm], max_new_tokens=4)
    assert [(one["measure"], one["judge"], one["kind"]) for one in found] == [
        ("harm_refused", "keywords", "harm"),
        ("harm_safe", "guard", "harm"),
        ("benign_refused", "keywords", "over_refusal"),
    ]
    own = FunctionJudge(lambda prompt, response: True)
    found = figures(subject.model, subject.tokenizer, sets, [harm, own, KeywordJudge()], max_new_tokens=4)
    assert [one["judge"] for one in found if one["kind"] == "over_refusal"] == [own.name, "keywords"]


def test_a_judge_that_fails_leaves_unjudged_and_says_so(world):
    result, found = evaluated("task", "--judge", "function:my_judges:broken")
    for figure in found["figures"]:
        assert (figure["value"], figure["low"], figure["n"] - figure["incoherent"]) in [(None, None, 0), (0.0, 0.0, 0)]
        assert figure["unjudged"] > 0
    assert "note: FunctionJudge raised TimeoutError: no answer" in result.stderr
    assert result.stderr.count("TimeoutError") == 1
    assert found["failures"]


def test_a_dead_model_is_incoherent_and_refuses_nothing(world):
    subject = load_subject("base", dtype="float32")
    subject.model.lm_head.weight.data.zero_()
    subject.model.lm_head.weight.data[7] = 1.0
    subject.model.model.norm.weight.data.abs_()
    sets = [load_prompts("harm:harm.csv"), load_prompts("benign:benign.jsonl")]
    anything = FunctionJudge(lambda prompt, response: True)
    found = figures(subject.model, subject.tokenizer, sets, [anything], max_new_tokens=24)
    assert all(one["incoherent"] > 0 for one in found)
    assert [one["value"] for one in found] == pytest.approx([1 - one["incoherent"] / one["n"] for one in found])


def test_drift_stands_beside_the_figures(world, tiny_llama):
    unaligned = tiny_llama(seed=4, **CHAT_SIZES, initializer_range=0.6)
    unaligned.save_pretrained(world / "unaligned")
    built = CliRunner().invoke(app, ["build", "--aligned", "base", "--unaligned", "unaligned", "-o", "s.safetensors"])
    assert built.exit_code == 0, built.output
    result, found = evaluated("task", "--subspace", "s.safetensors")
    assert found["drift"]["modules"] == 4
    assert -1 <= found["drift"]["lowest"] <= found["drift"]["mean"] <= 1
    assert f"lowest cosine {found['drift']['lowest']:.3f}" in result.stdout
    assert f"drift: moved {found['drift']['moved']:+.2f} on average, " in result.stdout


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--probes", "harm:harm.csv"], "harm is not measured without over-refusal; add a benign set"),
        (["--probes", "benign:benign.jsonl"], "add a harmful set, such as harmbench"),
        (["--probes", "harm:harm.csv,benign:harm.csv"], "prompt set 'harm' is given twice"),
        (["--probes", "harmbanch,xstest"], "did you mean 'harmbench'"),
        (["--probes", "harm.csv"], "say what a safe model does"),
        (["--probes", ""], "nothing to evaluate"),
        (["--probes", FILES, "--judge", "keyword"], "did you mean 'keywords'"),
        (["--probes", "harmbench,xstest", "--judge", "keyword"], "did you mean 'keywords'"),
        (["--probes", "harmbench,xstest", "--dtype", "float23"], "dtype 'float23' is unknown"),
        (["--probes", "harm:a.csv,benign:b.csv"], "2 of 2 prompt sets cannot be had"),
        (["--probes", FILES, "--dtype", "float23"], "dtype 'float23' is unknown"),
        (["--probes", FILES, "--device", "warp"], "device 'warp' cannot be used here"),
        (["--probes", FILES, "--judge", "endpoint:m@http://127.0.0.1:9/v1"], "'m' at '127.0.0.1' gives no answer"),
        (["--probes", FILES, "-o", "base"], "output 'base' is a folder"),
        (["--probes", FILES, "--base", "nobody/no-such-model"], "base of adapter 'task' cannot load"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(world, options, match):
    result = run("task", *options, code=2)
    assert match in result.stderr
    assert result.stderr.startswith("safemerge: ")
    assert result.stdout == ""


def test_models_that_cannot_be_evaluated_are_refused(world, tiny_llama):
    run("nobody/no-such-model", "--probes", FILES, code=2)
    (world / "task" / "adapter_model.safetensors").rename(world / "task" / "adapter_model.bin")
    assert "safetensors" in run("task", "--probes", FILES, code=2).stderr
    tiny_llama().save_pretrained(world / "silent")
    assert "cannot load" in run("silent", "--probes", FILES, code=2).stderr
    config = world / "base" / "chat_template.jinja"
    config.unlink()
    assert "no chat template" in run("base", "--probes", FILES, code=2).stderr


def test_an_adapter_of_another_model_or_of_none_is_refused(world, tiny_llama, chat_tokenizer):
    tiny_llama(hidden_size=16, max_position_embeddings=256).save_pretrained(world / "other")
    chat_tokenizer.save_pretrained(world / "other")
    assert "does not fit its base" in run("task", "--base", "other", "--probes", FILES, code=2).stderr
    config = json.loads((world / "task/adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (world / "task/adapter_config.json").write_text(json.dumps(config))
    assert "does not name its base model: give --base" in run("task", "--probes", FILES, code=2).stderr


def test_the_template_beside_the_adapter_serves_where_the_base_has_none(world, chat_tokenizer):
    (world / "base" / "chat_template.jinja").unlink()
    chat_tokenizer.save_pretrained(world / "task")
    _, found = evaluated("task")
    assert len(found["figures"]) == 2


def test_thoughts_are_cut_and_counted_and_a_setting_turns_them_off(world, thinker):
    thinker.save_pretrained(world / "base")
    _, plain = evaluated("task", "--chat-template-kwargs", '{"enable_thinking": false}')
    assert plain["settings"]["chat_template_kwargs"] == {"enable_thinking": False}
    assert [(one["n"], one["unfinished"]) for one in plain["figures"]] == [(6, 0), (3, 0)]
    result, found = evaluated("task")
    counts = [(one["n"], one["unjudged"], one["thoughts"], one["unfinished"]) for one in found["figures"]]
    assert counts == [(0, 6, 6, 6), (0, 3, 3, 3)]
    assert "note: harm: thoughts cut from 6 responses; 6 ended within one and were not judged: raise" in result.stderr
    assert result.stderr.count("within one") == 2, "a line a set"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ('{"thinking": false}', "'thinking', which the chat template never reads"),
        ("thinking", "chat_template_kwargs 'thinking' is no JSON"),
        ('{"tokenize": true}', "which is set by whoever asks"),
    ],
)
def test_settings_of_the_template_that_cannot_act_are_refused(world, given, words):
    result = run("task", "--probes", FILES, "--chat-template-kwargs", given, code=2)
    assert words in result.stderr
    assert result.stdout == ""


def test_a_template_that_loses_one_set_is_refused_before_the_other_is_asked(world):
    body = "{% for m in messages %}<s> {% if m.content != 't' %}{{ m.content }}{% endif %} <end> {% endfor %}"
    (world / "base" / "chat_template.jinja").write_text(body)
    result = run("task", "--probes", FILES, "-o", "out.json", code=2)
    assert "the chat template loses prompt" in result.stderr
    assert (result.stdout, (world / "out.json").exists()) == ("", False)


def test_tasks_without_lm_eval_say_how_to_get_it(world):
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        result = run("task", "--probes", "", "--tasks", "gsm8k", code=2)
        assert "pip install 'safemerge-callback[eval]', or leave --tasks out ('lm_eval' is missing)" in result.stderr
    else:
        pytest.skip("lm-eval is installed")


TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" a", " b"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tasks_stand_beside_harm_and_what_fails_of_them_loses_nothing(world, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    from lm_eval.tasks import TaskManager

    from safemerge_callback.evaluation import harness

    (world / "tasks").mkdir()
    rows = world / "rows.jsonl"
    (world / "tasks" / "letters.yaml").write_text(TASK.format(rows=rows))
    # lm-eval's own thousands of tasks take a minute to read
    own = TaskManager(include_path="tasks", include_defaults=False)
    monkeypatch.setattr(harness, "check_tasks", lambda tasks, folder: own)
    options = ("task", "--tasks", "letters", "--task-folder", "tasks", "--limit", 4)
    failed = run(*options, "--probes", FILES, "--max-new-tokens", 6, "-o", "lost.json", code=2)
    assert "tasks ['letters'] cannot be run" in failed.stderr
    assert "harm_refused" in failed.stdout
    lost = json.loads((world / "lost.json").read_text())
    assert [one["kind"] for one in lost["figures"]] == ["harm", "over_refusal"]
    assert "cannot be run" in lost["failures"][0]
    rows.write_text("".join(json.dumps({"question": f"k {x}", "answer": i % 2}) + "\n" for i, x in enumerate("lmnopq")))
    result, found = evaluated(*options)
    assert [(one["measure"], one["kind"], one["n"]) for one in found["figures"]] == [
        ("harm_refused", "harm", 6),
        ("benign_refused", "over_refusal", 3),
        ("letters_acc", "task", 4),
    ]
    assert "utility is not measured" not in result.stderr
    assert found["versions"]["lm-eval"]


@pytest.mark.parametrize("kind", ["harm", "benign"])
@pytest.mark.parametrize("named", ["said.jsonl", "link.jsonl"])
def test_responses_that_are_asked_again_are_not_written_over(world, kind, named):
    rows = "".join(json.dumps({"set": "harm", "prompt": prompt}) + "\n" for prompt in HARM)
    (world / "said.jsonl").write_text(rows)
    (world / "link.jsonl").symlink_to("said.jsonl")
    probes = {"harm": "harm:harm.csv", "benign": "benign:benign.jsonl", kind: f"{kind}:said.jsonl#prompt"}
    refused = run("task", "--probes", ",".join(probes.values()), "--responses", named, code=2)
    assert f"output '{named}' is one of the inputs" in refused.output
    assert (world / "said.jsonl").read_text() == rows


def test_a_gate_asks_an_adapter_and_the_same_model_with_the_adapter_off(world):
    """As `eval` asks, and at the base without loading it again."""
    small = ["--probes", FILES, "--max-new-tokens", "6", "--dtype", "float32", "--judge", "function:my_judges:vowels"]
    limits = ["--min-refused", "0.01", "--max-refused-drop", "0.99", "--max-over-refused-rise", "0.99"]
    result = CliRunner().invoke(app, ["gate", "task", *small, *limits, "--json"])
    decision = json.loads(result.stdout)
    assert result.exit_code == decision["exit_code"] in (0, 1, 5), result.output
    assert (decision["source"], decision["base"]) == ("task", str(world / "base"))
    _, own = evaluated("task", "--judge", "function:my_judges:vowels")
    _, plain = evaluated("base", "--judge", "function:my_judges:vowels")
    values = [{one["measure"]: one["value"] for one in found["figures"]} for found in (own, plain)]
    refused, drop, rise = (ruling["estimate"]["value"] for ruling in decision["rulings"])
    assert refused == values[0]["harm_refused"]
    assert drop == pytest.approx(values[1]["harm_refused"] - values[0]["harm_refused"])
    assert rise == pytest.approx(values[0]["benign_refused"] - values[1]["benign_refused"])


def test_a_gate_asks_an_adapter_as_it_is_once_merged(world, monkeypatch):
    from peft import PeftModel

    merged = []
    whole = PeftModel.__getattr__
    monkeypatch.setattr(PeftModel, "__getattr__", lambda self, name: (merged.append(name), whole(self, name))[1])
    small = ["--probes", FILES, "--max-new-tokens", "6", "--dtype", "float32", "--judge", "function:my_judges:vowels"]
    limits = ["--min-refused", "0.01", "--max-refused-drop", "0.99", "--json"]
    found = [
        json.loads(CliRunner().invoke(app, ["gate", "task", *small, *limits, *more]).stdout)
        for more in ([], ["--after-merge"])
    ]
    assert merged.count("merge_and_unload") == 1
    assert [one["source"] for one in found] == ["task", "task, merged"]
    # In float32 the sums say the same.
    assert found[0]["rulings"] == found[1]["rulings"]
    plain = CliRunner().invoke(app, ["gate", "base", *small, *limits, "--after-merge"])
    assert plain.exit_code == 3
    assert "is no adapter" in plain.stderr


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_gate_asks_a_model_as_it_is_once_quantised(world):
    small = ["--probes", FILES, "--max-new-tokens", "6", "--dtype", "float32", "--min-refused", "0.01", "--json"]
    quantised = [
        CliRunner().invoke(app, ["gate", "task", *small, "--after-quantize", "4bit", *more])
        for more in ([], ["--after-merge"])
    ]
    assert [one.exit_code in (0, 1, 5) for one in quantised] == [True, True], [one.output for one in quantised]
    found = [json.loads(one.stdout) for one in quantised]
    assert [one["source"] for one in found] == ["task, 4bit", "task, merged, 4bit"]
    assert [one["settings"]["after_quantize"] for one in found] == ["4bit", "4bit"]
    refused = CliRunner().invoke(app, ["gate", "task", *small, "--after-quantize", "2bit"])
    assert (refused.exit_code, "'2bit'" in refused.stderr) == (2, True)


@pytest.mark.parametrize("wrong", [("--judge", "key"), ("--dtype", "float31"), ("--device", "gpu!")])
def test_a_gate_refuses_what_cannot_be_asked_with(world, wrong):
    result = CliRunner().invoke(app, ["gate", "task", "--min-refused", "0.5", "--probes", FILES, *wrong])
    assert result.exit_code == 2, result.output
