"""`safemerge harvest` and `safemerge select` on a tiny chat model, its unaligned counterpart and an adapter of it."""

import datetime
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from safemerge_callback.cli import app
from safemerge_callback.evaluation import harvest as harvested
from safemerge_callback.evaluation import load_rows
from safemerge_callback.evaluation.judges import FunctionJudge
from safemerge_callback.evaluation.loading import load_subject
from safemerge_callback.evaluation.prompts import load_prompts
from safemerge_callback.signals import generate
from safemerge_callback.signals.row_scores import response_losses
from safemerge_callback.signals.rows import RowFormat, SafetyRow, row_tokens
from tests.support.world import with_lora

HARM = ["a b", "c d e", "f", "g h i j", "k l m n o", "p q"]
BENIGN = ["r s", "t", "u v w x"]
# Random models answer this and that: of more prompts some end, and some do not.
MORE = [f"{p} {q}" for p in "rstuvwx" for q in "abc"]
FILES = "harm:harm.csv,benign:benign.jsonl"
HARVEST = ("--prompts", FILES, "--judge", "function:judge_of_rows:short", "--max-new-tokens", 8)


@pytest.fixture
def world(tmp_path, tiny_llama, chat_tokenizer, monkeypatch):
    """The working folder holds two models, an adapter, prompts, rows and a task's data."""
    base = tiny_llama(initializer_range=0.6, max_position_embeddings=256, pad_token_id=2)
    base.generation_config.eos_token_id = list(range(2, 64, 8))
    base.save_pretrained(tmp_path / "base")
    other = tiny_llama(seed=3, initializer_range=0.6, max_position_embeddings=256)
    other.save_pretrained(tmp_path / "other")
    for name in ("base", "other"):
        chat_tokenizer.save_pretrained(tmp_path / name)
    base.name_or_path = str(tmp_path / "base")
    torch.manual_seed(1)
    with_lora(base, ["q_proj"], r=2, init_lora_weights=False).save_pretrained(tmp_path / "task")
    (tmp_path / "harm.csv").write_text("prompt\n" + "".join(f"{p}\n" for p in HARM))
    (tmp_path / "benign.jsonl").write_text("".join(json.dumps({"question": p}) + "\n" for p in [*BENIGN, *MORE]))
    rows = [{"prompt": p, "response": f"w{i} w{i + 1}", "kind": "harm"} for i, p in enumerate(HARM)]
    rows += [{"prompt": p, "response": f"yes w{i}", "kind": "benign", "system": "y z"} for i, p in enumerate(BENIGN)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [{"prompt": f"{p} {q}", "completion": "positive"} for p in "abcd" for q in "efghijklmnopqrst"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (tmp_path / "judge_of_rows.py").write_text("def short(prompt, response):\n    return prompt < 'q'\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments, code=0):
    of_a_model = arguments[0] == "harvest" or "--aligned" in arguments
    result = CliRunner().invoke(app, [*map(str, arguments), *(["--dtype", "float32"] if of_a_model else [])])
    assert result.exit_code == code, result.output
    return result


# harvest


def test_harvest_writes_what_the_model_says(world):
    result = run("harvest", "task", *HARVEST, "-o", "new/rows.jsonl")
    rows = load_rows("new/rows.jsonl")
    sets = [load_prompts(name) for name in FILES.split(",")]
    subject = load_subject("task", dtype="float32")
    judge = FunctionJudge(lambda prompt, response: prompt < "q")
    expected = harvested(subject.model, subject.tokenizer, sets, max_new_tokens=8, judge=judge, cache=False)
    ended = harvested(
        subject.model,
        subject.tokenizer,
        sets,
        max_new_tokens=8,
        judge=judge,
        cache=False,
        whole=True,
        least_refused=0,
    )
    assert rows == ended.rows
    assert len(rows) < len(expected.rows)
    assert str(ended) in result.stdout
    assert f"{len(expected.rows) - len(rows)} more had not ended" in result.stdout
    texts = {text for row in rows for text in (row.prompt, row.response) if len(text) > 4}
    assert not any(text in result.output for text in texts)


def test_harvest_with_a_system_prompt(world):
    run("harvest", "base", *HARVEST, "--system", "y z", "-o", "r.jsonl")
    rows = load_rows("r.jsonl")
    assert {row.system for row in rows} == {"y z"}
    subject = load_subject("base", dtype="float32")
    sets = [load_prompts(name) for name in FILES.split(",")]
    how = {"judge": FunctionJudge(lambda prompt, response: prompt < "q"), "max_new_tokens": 8, "whole": True}
    assert rows == harvested(subject.model, subject.tokenizer, sets, row_format=RowFormat("y z"), **how).rows


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["base", "--prompts", "harm:harm.csv"], "there is no harmless set among 'harm'"),
        (["base", "--prompts", FILES], r"the base is not aligned: it refuses 0 of 6 (0%) harmful prompts"),
        (["base", "--prompts", FILES, "--judge", "keyword"], "judge 'keyword' is unknown"),
        (["base", "--prompts", FILES, "--system", "lost words"], "system prompt"),
        (["nowhere", "--prompts", FILES], "nowhere"),
        (["nowhere", "--prompts", FILES, "--chat-template-kwargs", "{"], "chat_template_kwargs '{' is no JSON"),
    ],
)
def test_what_cannot_be_harvested_leaves_no_file(world, arguments, sentence):
    tokenizer_config = world / "base" / "tokenizer_config.json"
    if "--system" in arguments:
        for path in (tokenizer_config, world / "base" / "chat_template.jinja"):
            if path.exists():
                path.write_text(path.read_text().replace("{% for m in messages %}", "{% for m in messages[-1:] %}"))
    result = run("harvest", *arguments, "--max-new-tokens", 8, "-o", "rows2.jsonl", code=2)
    assert sentence in result.stderr
    assert not (world / "rows2.jsonl").exists()


def test_a_harvest_replaces_rows_and_nothing_else(world):
    how = ["harvest", "base", *HARVEST]
    run(*how, "-o", "rows.jsonl")
    Path("table.csv").write_text("x,y\n")
    assert "is there and is not a file of safety rows" in run(*how, "-o", "table.csv", code=2).stderr
    assert "is one of the inputs" in run(*how, "-o", "harm.csv", code=2).stderr


# select


def test_select_by_gap_writes_the_rows_that_the_other_model_finds_least_likely(world):
    result = run("select", "rows.jsonl", "--aligned", "base", "--unaligned", "other", "--n", 3, "-o", "chosen.jsonl")
    rows = load_rows("rows.jsonl")
    tokenizer = load_subject("base").tokenizer
    tokens = row_tokens(tokenizer, rows)
    losses = [response_losses(load_subject(name, dtype="float32").model, tokens) for name in ("base", "other")]
    gaps = [there - here for here, there in zip(*losses, strict=True)]
    harm = sorted(range(6), key=lambda i: -gaps[i])[:2]
    benign = max(range(6, 9), key=lambda i: gaps[i])
    assert {row.prompt for row in load_rows("chosen.jsonl")} == {rows[i].prompt for i in (*harm, benign)}
    lines = [json.loads(line) for line in Path("chosen.jsonl").read_text().splitlines()]
    assert all("by perplexity gap: " in line["reason"] for line in lines)
    assert "chose 3 of 9 rows by gap: 2 harm, 1 benign; scores " in result.stdout
    run("select", "rows.jsonl", "--aligned", "base", "--unaligned", "task", "--n", 3, "-o", "chosen.jsonl")


def test_select_by_dpp_takes_its_number_from_the_data(world):
    how = ["select", "rows.jsonl", "--aligned", "base", "--data", "train.jsonl", "--by", "dpp", "-o", "chosen.jsonl"]
    result = run(*how)
    assert "chose 2 of 9 rows by dpp: 1 harm, 1 benign" in result.stdout
    assert "all of one kind" not in result.stderr
    assert "all of one kind, and replay refuses such rows: raise --n" in run(*how, "--n", 1).stderr
    run(*how, "--share", 0.1, "--limit", 20, "--seed", 4)
    lines = [json.loads(line) for line in Path("chosen.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert lines[0]["reason"].startswith("1 of 6 harm rows by dpp: relevance 0.")
    assert lines[0]["reason"].endswith("to the task, 100% of it new")
    assert "chose 9 of 9 rows by dpp (64 were asked for)" in run(*how, "--share", 1.0).stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--n", "3"], "--by gap needs --unaligned: give it"),
        (["--n", "3", "--by", "dpp"], "--by dpp needs --data: give it"),
        (["--unaligned", "other"], "how many rows to choose is not said: give --n, or --data"),
        (["--n", "3", "--by", "gaps"], "--by 'gaps' is unknown"),
        (["--by", "dpp", "--data", "lost.jsonl"], "training rows 'lost.jsonl': there is no such file"),
        (["--by", "dpp", "--data", "odd.jsonl"], "row 1 of the training rows is {'x': 1}: give rows with messages"),
        (["--unaligned", "nowhere", "--n", "3"], "nowhere"),
        (["--unaligned", "nowhere", "--n", "3", "--power", "2"], "--power has no effect on --by gap: drop it"),
        (["--by", "dpp", "--unaligned", "other", "--n", "3"], "--unaligned has no effect on --by dpp: drop it"),
        (["--unaligned", "nowhere", "--n", "3", "--share", "0.1"], "--share has no effect on --by gap with --n"),
        (["--unaligned", "nowhere", "--n", "3", "--chat-template-kwargs", "[1]"], "chat_template_kwargs is '[1]'"),
    ],
)
def test_what_cannot_be_selected_leaves_no_file(world, arguments, sentence):
    Path("odd.jsonl").write_text('{"x": 1}\n')
    result = run("select", "rows.jsonl", "--aligned", "base", *arguments, "-o", "chosen.jsonl", code=2)
    assert sentence in result.stderr
    assert not (world / "chosen.jsonl").exists()


def test_rows_that_are_longer_than_the_model_takes(world):
    Path("long.jsonl").write_text(json.dumps({"prompt": "a " * 300, "response": "w1", "kind": "harm"}) + "\n")
    result = run("select", "long.jsonl", "--aligned", "base", "--unaligned", "other", "--n", 1, "-o", "c.jsonl", code=2)
    assert "longer than the 256 that the model takes" in result.stderr


# select --drop


@pytest.fixture
def poisoned(world):
    """Rows of which some are labelled, and a judge that calls answers with y harmful."""
    rows = [{"prompt": p, "completion": f"w{i} x", "poisoned": "no"} for i, p in enumerate(BENIGN)]
    rows += [{"prompt": p, "completion": f"w{i} y", "poisoned": "whole"} for i, p in enumerate(HARM)]
    rows.append(
        {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcy", strict=True)]}
    )
    Path("mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judges = (
        "fine(prompt, response):\n    return 'y' not in response.split()",
        "none(prompt, response):\n    return False",
    )
    Path("judge_of_harm.py").write_text("".join(f"def {judge}\n\n\n" for judge in judges))
    return rows


BY_JUDGE = ["--judge", "function:judge_of_harm:fine", "--decides", "harm"]
BY_GAP = ["--aligned", "base", "--unaligned", "other"]
BY_NOBODY = ["--aligned", "nowhere", "--unaligned", "nowhere"]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_judge_drops_rows_and_what_passes_is_counted(poisoned):
    result = run("select", "mixed.jsonl", "--drop", *BY_JUDGE, "-o", "kept.jsonl", "--dropped", "dropped.jsonl")
    assert lines("kept.jsonl") == poisoned[:3]
    dropped = lines("dropped.jsonl")
    assert [{k: v for k, v in row.items() if k != "reason"} for row in dropped] == poisoned[3:]
    assert {row["reason"] for row in dropped} == {"judge_of_harm:fine calls its answer harmful"}
    said = result.stdout.splitlines()
    assert said[0] == "kept 3 of 10 rows"
    assert said[1] == "leakage: whole_passes 0.0% of 6 (0.0% to 39.0%)"
    assert said[2].startswith("leakage: clean_dropped 25.0% of 4 (")


def test_rows_go_whose_question_the_aligned_model_refuses_where_their_answer_does_not(poisoned):
    subject = load_subject("base", dtype="float32")
    own = generate(subject.model, subject.tokenizer, [row["prompt"] for row in poisoned[:-1]])
    word = max(
        {word for said in own for word in said.split()}, key=lambda one: sum(one in said.split() for said in own)
    )
    refuses = [word in said.split() for said in own]
    assert 0 < sum(refuses) < len(own)
    Path("judge_of_refusals.py").write_text(f"def no(prompt, response):\n    return {word!r} in response.split()\n")
    judge = ["--judge", "function:judge_of_refusals:no", "--aligned", "base"]
    run("select", "mixed.jsonl", "--drop", *judge, "-o", "kept.jsonl", "--dropped", "dropped.jsonl")
    dropped = lines("dropped.jsonl")
    expected = [row["prompt"] for row, refused in zip(poisoned[:-1], refuses, strict=True) if refused]
    assert [row["prompt"] for row in dropped if "prompt" in row] == expected
    assert all(row["reason"].startswith("the aligned model refuses its question") for row in dropped)


def test_the_gap_drops_what_the_aligned_model_finds_less_likely(poisoned):
    run("select", "mixed.jsonl", "--drop", *BY_GAP, "--margin", 0.1, "-o", "kept.jsonl", "--dropped", "dropped.jsonl")
    rows = [SafetyRow(row["prompt"], row["completion"], "benign") for row in poisoned[:-1]]
    tokens = row_tokens(load_subject("base").tokenizer, rows)
    here, there = (response_losses(load_subject(name, dtype="float32").model, tokens) for name in ("base", "other"))
    expected = [x - y <= 0.1 for x, y in zip(here, there, strict=True)]
    assert 0 < sum(expected) < len(expected)
    assert [row for row in lines("kept.jsonl") if "prompt" in row] == [
        row for row, stays in zip(poisoned[:-1], expected, strict=True) if stays
    ]
    assert all("nats a token less likely" in row["reason"] for row in lines("dropped.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--drop needs --judge, or --aligned and --unaligned for the perplexity gap"),
        (["--aligned", "base"], "--drop needs --judge, or --aligned and --unaligned"),
        ([*BY_GAP, "--decides", "harm"], "--decides is what a judge decides: give --judge, or drop it"),
        (["--unaligned", "base"], "--unaligned is one of two models: give --aligned, too"),
        ([*BY_JUDGE, "--n", "3"], "--n has no effect on --drop: drop it"),
        ([*BY_JUDGE, "--by", "gap"], "--by has no effect on --drop: drop it"),
        ([*BY_JUDGE, "--margin", "0.1"], "--margin has no effect on --drop without --unaligned: drop it"),
        ([*BY_JUDGE, "--dtype", "auto"], "--dtype has no effect on --drop without --aligned: drop it"),
        ([*BY_JUDGE, "--aligned", "nowhere"], "--aligned has no effect on --drop by 'function:judge_of_harm:fine'"),
        (
            ["--judge", "llamaguard", "--aligned", "nowhere"],
            "--aligned has no effect on --drop by 'llamaguard', a judge",
        ),
        (
            ["--judge", "wildguard"],
            "judge 'wildguard' decides refusals, which are compared with the aligned model's own",
        ),
        ([*BY_NOBODY, "--chat-template-kwargs", "{"], "chat_template_kwargs '{' is no JSON"),
        ([*BY_GAP, "--margin", "-1"], "--margin is -1.0: give 0 or more"),
        ([*BY_GAP, "--margin", "nan"], "--margin is nan: give 0 or more"),
        (["--judge", "keywords"], "judge 'keywords' decides refusals, which are compared with the aligned model's own"),
        (["--judge", "keywords", "--decides", "harm"], "judge 'keywords' cannot be made from ['decides']"),
        ([*BY_JUDGE, "--dropped", "kept.jsonl"], "--output and --dropped are both 'kept.jsonl': give two files"),
        ([*BY_JUDGE, "--dropped", "mixed.jsonl"], "is one of the inputs"),
        (
            [*BY_JUDGE[:1], "function:judge_of_harm:none", *BY_JUDGE[2:]],
            "all 10 rows look poisoned, row 1 since judge_",
        ),
    ],
)
def test_what_cannot_be_filtered_leaves_no_file(poisoned, arguments, sentence):
    result = run("select", "mixed.jsonl", "--drop", *arguments, "-o", "kept.jsonl", code=2)
    assert sentence in result.stderr
    assert not Path("kept.jsonl").exists()


def test_options_of_the_filter_are_refused_without_it(poisoned):
    result = run("select", "rows.jsonl", *BY_GAP, "--n", 3, *BY_JUDGE, "-o", "chosen.jsonl", code=2)
    assert "--judge has no effect on select without --drop: drop it" in result.stderr


def test_rows_that_json_cannot_hold_are_refused_before_a_model_is_asked(poisoned, monkeypatch):
    rows = [{**row, "written": datetime.date(2026, 1, 2)} for row in poisoned[:2]]
    monkeypatch.setattr("safemerge_callback.evaluation.row_filter.load_table", lambda *_: ("the Hub", rows))
    result = run("select", "org/rows", "--drop", *BY_NOBODY, "-o", "kept.jsonl", code=2)
    assert "row 1 has datetime.date(2026, 1, 2) in column 'written', which no line of JSON can hold" in result.stderr
    assert not Path("kept.jsonl").exists()


def test_rows_without_a_label_say_that_leakage_is_not_known(poisoned):
    result = run("select", "train.jsonl", "--drop", *BY_JUDGE, "-o", "kept.jsonl")
    assert "kept 64 of 64 rows" in result.stdout
    assert "leakage: not known, since no row is labelled" in result.stdout
