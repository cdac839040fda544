"""Thoughts are cut before judging, whoever judges, and counted; what ends within one has no answer."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import KeywordJudge, judged, says
from safemerge_callback.evaluation.judges import FunctionJudge, load_judge
from safemerge_callback.signals import answer_of, generate
from safemerge_callback.signals.responses import respond, tokenized
from safemerge_callback.signals.thoughts import counts_of, spoken

HARMONY = "<|channel|>analysis<|message|>I cannot do it.<|end|><|start|>assistant<|channel|>final<|message|>Sure, so:"
ANSWERS = {
    "a thought": ("<think>I cannot.</think>\n\nSure, so:", "Sure, so:"),
    "opened by the prompt": ("I cannot.\n</think>\n\nSure, so:", "Sure, so:"),
    "empty": ("<think>\n\n</think>\n\nSure, so:", "Sure, so:"),
    "two thoughts": ("<think>I cannot.</think>Sure, <think>no</think>so:", "Sure, so:"),
    "opened twice": ("<think><think>I cannot.</think>Sure, so:", "Sure, so:"),
    "another's mark within": ("<think>I write </thinking> here.</think>Sure, so:", "Sure, so:"),
    "other words for it": ("<thinking>I cannot.</thinking>Sure, so:", "Sure, so:"),
    "Mistral's": ("[THINK]I cannot.[/THINK]Sure, so:", "Sure, so:"),
    "gpt-oss's": (HARMONY, "Sure, so:"),
    "gpt-oss's answer alone": ("<|channel|>final<|message|>Sure, so:", "Sure, so:"),
    "an answer, then a thought that never ends": ("Sure, so: <think>I cannot", "Sure, so:"),
    "nothing after it": ("<think>I cannot.</think>", ""),
    "cut off within": ("<think>I cannot", None),
    "gpt-oss's, cut off within": ("<|channel|>analysis<|message|>I cannot", None),
    "cut off in the second": ("<think>a</think> <think>I cannot", None),
}


@pytest.mark.parametrize(("response", "answer"), ANSWERS.values(), ids=ANSWERS)
def test_the_answer_in_a_response(response, answer):
    assert spoken(response).answer == answer
    assert answer_of(response) == (answer or "")
    assert not KeywordJudge().refuses("", response)
    assert not says("I", response)


@pytest.mark.parametrize("response", ["", "  I cannot.\n", "a < b > c, [THIN]", "Use the tag </b>."])
def test_a_response_without_thoughts_is_left_as_it_is(response):
    assert spoken(response) == (response, False)
    assert counts_of([response]) == (0, 0)


def test_an_end_that_follows_a_thought_belongs_to_the_answer():
    assert answer_of("<think>a</think>Write </think> at the end") == "Write </think> at the end"


class Remembers:
    def __init__(self):
        self.seen = []

    def refuse_all(self, prompts, responses):
        self.seen += responses
        return [response.startswith("I cannot") for response in responses]

    def refuses(self, prompt, response):
        return self.refuse_all([prompt], [response])[0]


def test_every_judge_reads_answers_alone_and_what_has_none_is_unjudged():
    said = [
        "<think>I cannot</think>Sure, so",
        "Sure</think>I cannot",
        "<think>I cannot",
        "<think>so</think>",
        "plain so",
    ]
    expected = ["complied", "refused", "unjudged", "incoherent", "complied"]
    batched = Remembers()
    seen = []
    one_by_one = load_judge(lambda prompt, response: seen.append(response) or response.startswith("I cannot"))
    for judge in (batched, one_by_one, KeywordJudge()):
        failures = []
        assert judged(judge, list("abcde"), said, failures=failures) == expected
        assert failures == []
    assert batched.seen == seen == ["Sure, so", "I cannot", "plain so"]
    assert isinstance(one_by_one, FunctionJudge)
    assert counts_of(said) == (4, 1)


WORDS = ["<pad>", "<s>", "<end>", "user", "bot", "<think>", "</think>", *"abcdefgh", "no", "yes"]
SPECIAL = ["[THINK]", "[/THINK]"]
CHAT = "{% for m in messages %}<s> user {{ m.content }} <end> {% endfor %}<s> bot OPEN"


def thinking(opens=""):
    """One token a word; `<think>` is a word and `[THINK]` a special token, which decoding leaves out."""
    words = WORDS + [f"w{i}" for i in range(60 - len(WORDS))]
    # the mark of the check, word by word
    words[-3:] = ["harmless", "question", "7261"]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<end>", pad_token="<pad>", unk_token="<pad>")
    made.add_tokens([AddedToken(word, special=True) for word in SPECIAL], special_tokens=True)
    made.chat_template = CHAT.replace("OPEN", opens)
    return made


def saying(model, tokenizer, *texts):
    """Let the model's generation end in the texts, in the order in which prompts are asked."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    longest = max(map(len, rows))

    def generated(input_ids, **_):
        new = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows])
        return torch.cat([input_ids, new], dim=1)

    model.generate = generated
    return model


@pytest.mark.parametrize(
    ("opens", "words", "text", "answer"),
    [
        ("", "a b", "a b", "a b"),
        ("", "<think> no </think> yes", "<think> no </think> yes", "yes"),
        ("", "[THINK] no [/THINK] yes", "<think> no </think> yes", "yes"),
        ("", "[THINK] no", "<think> no", ""),
        ("<think>", "no </think> yes", "<think> no </think> yes", "yes"),
        ("<think>", "no no", "<think> no no", ""),
        ("[THINK]", "no [/THINK] yes", "<think> no </think> yes", "yes"),
        ("<think> </think>", "yes", "yes", "yes"),
    ],
)
def test_marks_are_in_the_response_whether_they_are_words_special_or_the_prompts(
    tiny_llama, opens, words, text, answer
):
    tokenizer = thinking(opens)
    model = saying(tiny_llama(vocab_size=64).eval(), tokenizer, words)
    (said,) = respond(model, tokenizer, tokenized(tokenizer, ["a b"]))
    assert "".join(said.text.split()) == "".join(text.split())
    assert said.tokens == len(tokenizer(words)["input_ids"])
    assert answer_of(said.text) == answer


def test_generate_warns_of_answers_that_never_come(tiny_llama):
    tokenizer = thinking("<think>")
    model = saying(tiny_llama(vocab_size=64).eval(), tokenizer, "no no no", "no </think> yes")
    with pytest.warns(UserWarning, match="end within a thought and have no answer: raise max_new_tokens, or turn"):
        said = generate(model, tokenizer, ["a", "b"], label=None)
    assert [answer_of(text) for text in said] == ["", "yes"]


def test_a_thinking_endpoint_or_guard_is_read_by_its_answer():
    assert says("yes", "<think>No, wait.</think>\nYes.")
    assert not says("no", "<think>No, wait.</think>\nYes.")


def test_lengths_that_differ_are_refused_as_ever():
    with pytest.raises(ConfigError, match="1 prompts and 2 responses"):
        judged(KeywordJudge(), ["a"], ["<think>", "b"])
