"""One Bad Model's two steps on a tiny model: the rows that are written, the checks on them, and the merge."""

import json

import pytest
import torch

from recipes.one_bad_model import domain_rows, main, write_rows
from safemerge_callback.errors import ConfigError, SafeMergeError
from safemerge_callback.evaluation.judges import KeywordJudge
from safemerge_callback.evaluation.questions import load_questions
from safemerge_callback.evaluation.rows import load_rows
from safemerge_callback.evaluation.verdicts import judged
from safemerge_callback.signals.responses import respond
from safemerge_callback.signals.rows import prompt_tokens
from tests.support.world import save_lora, write_checkpoints, write_subspace

TARGETS = ["q_proj", "v_proj"]


class Short:
    """Calls a response a refusal where the prompt is short: a judge that needs no words."""

    decides = "refusal"

    def refuses(self, prompt, response):
        return len(prompt) < 3


@pytest.fixture(scope="module")
def place(tmp_path_factory, chat_tokenizer):
    """A fine-tuned adapter, a safety adapter and their subspace, on a tiny chat model."""
    from tests.conftest import _factory

    folder = tmp_path_factory.mktemp("one_bad")
    make = _factory("Llama", num_key_value_heads=4, vocab_size=64, pad_token_id=2, initializer_range=0.6)
    write_checkpoints(folder, make(seed=1), noise=0.05, tokenizer=chat_tokenizer)
    write_subspace(folder, "s.safetensors", TARGETS)

    def named(seed):
        model = make(seed=1)
        model.name_or_path = str(folder / "aligned")
        return model

    for seed, name in enumerate(("task", "safety"), 5):
        save_lora(named, folder / name, seed, TARGETS, task_type="CAUSAL_LM")
    (folder / "harm.txt").write_text("a\nb\nc\n")
    (folder / "benign.txt").write_text("a b c d\ne f g h\n")
    return folder


@pytest.fixture(scope="module")
def subject(place):
    from safemerge_callback.evaluation.loading import load_subject

    return load_subject(str(place / "task"), dtype="float32", device="cpu")


def test_responses_that_are_there_stay_and_the_others_are_the_fine_tuned_models(subject):
    questions = load_questions([{"prompt": "a b", "completion": "yes w1"}, {"prompt": "c d e"}], "questions", "benign")
    rows = domain_rows(subject, questions, 6)
    assert rows[0] == questions[0]
    tokens = prompt_tokens(subject.tokenizer, ["c d e"])
    said = respond(subject.model, subject.tokenizer, tokens, max_new_tokens=6)[0].text
    kept = judged(KeywordJudge(), ["c d e"], [said]) == ["complied"]
    assert [row.response for row in rows[1:]] == [said] * kept


def test_a_refusal_or_babble_of_the_fine_tuned_model_is_no_domain_row(subject, monkeypatch):
    said = ["I cannot help with that.", "", "it is blue"]
    monkeypatch.setattr(
        "recipes.one_bad_model.respond", lambda *args, **kwargs: [type("R", (), {"text": text}) for text in said]
    )
    questions = load_questions([{"prompt": letter} for letter in "abc"], "questions", "benign")
    assert [row.prompt for row in domain_rows(subject, questions, 6)] == ["c"]


def test_safety_rows_are_the_aligned_models(place, subject, tmp_path, chat_tokenizer):
    from transformers import AutoModelForCausalLM

    aligned = AutoModelForCausalLM.from_pretrained(place / "aligned", dtype=torch.float32).eval()
    prompts = [f"harm:{place / 'harm.txt'}", f"benign:{place / 'benign.txt'}"]
    questions = load_questions([{"prompt": "a", "completion": "yes"}], "questions", "benign")
    rows = write_rows(subject, questions, tmp_path, prompts=prompts, judge=Short(), max_new_tokens=5)
    table = load_rows(rows.safety)
    assert {row.kind for row in table} == {"harm", "benign"}
    tokens = prompt_tokens(chat_tokenizer, [row.prompt for row in table])
    said = respond(aligned, chat_tokenizer, tokens, max_new_tokens=5)
    assert [row.response for row in table] == [one.text for one in said]
    assert "domain rows: 1 of 1 questions" in rows.words


def test_both_steps_from_the_command_line(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recipes.one_bad_model.load_judge", lambda name: Short())
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in ["ab", "cd"])
    )
    sets = ["--prompts", f"harm:{place / 'harm.txt'}", f"benign:{place / 'benign.txt'}"]
    words = ["--questions", str(tmp_path / "q.jsonl"), "--subspace", str(place / "s.safetensors"), "--dtype", "float32"]
    out = tmp_path / "merged"
    main([str(place / "task"), str(place / "safety"), *words, *sets, "--max-new-tokens", "4", "-o", str(out)])
    assert "fine-tuned" in capsys.readouterr().out
    assert (out / "search.jsonl").is_file()
    assert {path.name for path in (tmp_path / "merged.rows").iterdir()} == {"safety.jsonl", "domain.jsonl"}


def test_a_model_without_an_adapter_is_refused(place, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["--questions", str(tmp_path / "q.jsonl"), "--subspace", "s", "-o", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="is no adapter: give the fine-tuned LoRA"):
        main([str(place / "aligned"), *words])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--minimiser", "goldn"], "minimiser 'goldn' is unknown"),
        (["--num-questions", "-1"], "--num-questions is -1: give 1 or more"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0: give 1 or more"),
        (["-o", "full"], "output 'full' is not empty"),
        (["--subspace", "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_what_the_search_refuses_is_refused_before_a_row_is_written(place, tmp_path, monkeypatch, wrong, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    monkeypatch.setattr("recipes.one_bad_model.write_rows", lambda *args, **kwargs: pytest.fail("rows were written"))
    told = ["--questions", "q.jsonl", "--subspace", str(place / "s.safetensors"), "-o", "out"]
    with pytest.raises(SafeMergeError, match=words):
        main([str(place / "task"), *told, *wrong])


def test_no_domain_row_left_is_refused(subject, tmp_path, place, monkeypatch):
    monkeypatch.setattr("recipes.one_bad_model.domain_rows", lambda *args: [])
    prompts = [f"harm:{place / 'harm.txt'}", f"benign:{place / 'benign.txt'}"]
    with pytest.raises(ConfigError, match="of 0 questions none got an answer"):
        write_rows(
            subject,
            [],
            tmp_path / "x",
            prompts=prompts,
            judge=Short(),
            max_new_tokens=4,
        )
    assert not (tmp_path / "x").exists()
