"""Every verb on tiny models with --json and --quiet: what stdout holds, and that docs/cli.md has its keys."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from safemerge_callback.cli import app
from tests.support.chat_world import CHAT_SIZES, FILES, make_chat_world

PAGE = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
JUDGE = ("--judge", "function:my_judges:vowels")
ASKED = ("--probes", FILES, "--max-new-tokens", 4, "--dtype", "float32", *JUDGE)
ROWS = ("--task-rows", "train.jsonl", "--safety-rows", "rows.jsonl")
HARVEST = (
    "--prompts",
    "harm:harm.csv,benign:mild.txt",
    "--judge",
    "function:early_judge:early",
    "--max-new-tokens",
    8,
)
# A call of each verb that has all of its keys, in an order in which each finds its files, and the code it ends with.
CALLS = {
    "build": ("--aligned", "base", "--unaligned", "other", "--target-modules", "q_proj,v_proj", "-o", "s.safetensors"),
    "describe": ("s.safetensors", "--verify"),
    "compress": ("s.safetensors", "-o", "s8.safetensors"),
    "measure": ("task", "-s", "s.safetensors", "--threshold", 0.5),
    "merge": ("task", "-s", "s.safetensors", "-o", "merged"),
    "bake": ("task", "--base", "base", "-o", "full"),
    "sweep": ("task", "-s", "s.safetensors", "--gates", "all", "--weights", "0.8/0.2", "-o", "sweep.csv"),
    "search": ("task", "-s", "s.safetensors", *ROWS, "--evaluations", 3, "--dtype", "float32", "-o", "searched"),
    "report": ("merged",),
    "undo": ("run",),
    "doctor": ("base", "--adapter", "task"),
    "init": ("base", "-o", "safemerge.yaml"),
    "eval": ("task", *ASKED, "--responses", "a.jsonl", "-o", "eval.json"),
    "focal": ("a.jsonl", "b.jsonl", "--set", "harm", "--judge", "my_judges:vowels", "--count", 1),
    "harvest": ("other", *HARVEST, "--dtype", "float32", "-o", "harvested.jsonl"),
    "select": ("rows.jsonl", "--aligned", "base", "--unaligned", "other", "--n", 3, "-o", "chosen.jsonl"),
    "select --drop": ("poisoned.jsonl", *JUDGE, "--decides", "harm", "-o", "kept.jsonl"),
    "compare": ("eval.json", "eval.json"),
    "gate": ("task", *ASKED, "--min-refused", 1e-6, "--evidence"),
    "gate --verify": ("task", "--base", "base", "--probes", FILES),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, chat_tokenizer, world):
    """The files that the calls need, and a run that merged at its end."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = make_chat_world(tmp_path_factory.mktemp("json"), chat_tokenizer)
    torch.manual_seed(4)
    other = LlamaForCausalLM(LlamaConfig(**CHAT_SIZES, initializer_range=0.6))
    # A random model seldom ends what it began, and a harvest takes what has ended.
    other.generation_config.eos_token_id = list(range(2, 64, 4))
    other.save_pretrained(folder / "other")
    (folder / "early_judge.py").write_text("def early(prompt, response):\n    return prompt < 'q'\n")
    (folder / "mild.txt").write_text("".join(f"{p} {q}\n" for p in "rstuvwx" for q in "abc"))
    chat_tokenizer.save_pretrained(folder / "other")
    kinds = zip("abcd", ("harm", "benign") * 2, strict=True)
    rows = [{"prompt": prompt, "response": "w1 w2", "kind": kind} for prompt, kind in kinds]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = [{"prompt": f"{p} q", "completion": "positive"} for p in "abcd"]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task))
    poisoned = [{"prompt": p, "completion": p, "poisoned": p in "ae"} for p in "abcdefgh"]
    (folder / "poisoned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in poisoned))
    trainer = world.trainer(folder / "run", world.guard(every=0), max_steps=2, save_strategy="no")
    trainer.train()
    trainer.save_model()
    return folder


def run(verb, *words):
    name, *more = verb.split()
    return CliRunner().invoke(app, [name, *more, *map(str, words)])


@pytest.fixture(scope="module")
def results(folder):
    """What each verb printed with --json."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        found = {}
        for verb, words in CALLS.items():
            found[verb] = run(verb, *words, "--json")
            if verb == "eval":
                shutil.copy("a.jsonl", "b.jsonl")
        return found


def documented():
    """Verb -> the keys that its row of the page has."""
    section = PAGE[PAGE.index("## JSON") :]
    rows = re.findall(r"^\| `([a-z -]+)` \| (.*?) \|$", section, re.M)
    return {verb: set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", keys))) for verb, keys in rows}


@pytest.mark.parametrize("verb", CALLS)
def test_stdout_is_one_document_with_the_keys_of_the_page(results, verb):
    result = results[verb]
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code in (0, 1, 5), result.output
    document = json.loads(result.stdout)
    assert set(document) == documented()[verb]


def test_every_verb_that_is_no_screen_has_both_options_and_a_row():
    commands = get_command(app).commands
    options = {name: {word for one in command.params for word in one.opts} for name, command in commands.items()}
    screens = {name for name, words in options.items() if not {"--json", "--quiet"} <= words}
    assert screens == {"watch"}
    assert {verb.split()[0] for verb in CALLS} | {"push"} == set(options) - screens
    assert set(documented()) == {*CALLS, "push"}


def test_what_was_pushed_is_a_document_too(hub, world):
    result = run("push", world.subspace, "me/v", "--json")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)) == documented()["push"]


def test_nothing_draws_progress_where_there_is_no_terminal(results):
    drawn = {verb for verb, result in results.items() if "\r" in result.stderr or "it/s" in result.stderr}
    assert drawn == set()


QUIET = ("describe", "measure", "compare", "doctor", "focal", "report", "init")


@pytest.mark.parametrize("verb", QUIET)
def test_quiet_prints_nothing_and_json_all_the_same(results, folder, monkeypatch, verb):
    monkeypatch.chdir(folder)
    quiet = run(verb, *CALLS[verb], "--quiet")
    assert (quiet.exit_code, quiet.output) == (results[verb].exit_code, "")
    both = run(verb, *CALLS[verb], "-q", "--json")
    assert json.loads(both.stdout).keys() == json.loads(results[verb].stdout).keys()
    assert both.stderr == ""


def test_errors_are_never_quiet_and_never_on_stdout(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for more in ((), ("--json",), ("--quiet",), ("--json", "--quiet")):
        result = run("measure", "task", "-s", "absent.safetensors", *more)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "absent.safetensors" in result.stderr


def test_the_page_has_every_exit_code():
    from safemerge_callback.cli.app import ERROR
    from safemerge_callback.evaluation import acceptance, comparison

    section = PAGE[PAGE.index("## Exit codes") : PAGE.index("## JSON")]
    codes = {int(code) for code in re.findall(r"^\| (\d) \|", section, re.M)}
    assert codes == {2, ERROR, *acceptance.EXIT_CODES.values(), *comparison.EXIT_CODES.values()}
