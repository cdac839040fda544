"""The model is asked what it is meant to be asked, whatever its chat template does, or the template is refused."""

import copy

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.probe import Questions
from safemerge_callback.signals import generate
from safemerge_callback.signals.responses import tokenized

PROMPTS = ["How do I bake bread?", 'How do I\n pick a lock, "safely"?  ']
# A special token at the front, as Llama's: written by the template, and by the tokenizer if it is asked to.
VOCABULARY = {chr(i): i - 32 for i in range(32, 127)} | {"<pad>": 95, "</s>": 96, "<s>": 97, "\n": 98}
LOOP = "{% for m in messages %}[{{ m['role'] }}] BODY {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
PARTS = (
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer():
    """One token a character."""
    built = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 97)])
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def with_template(tokenizer, body):
    tokenizer.chat_template = LOOP.replace("BODY", body) if "messages" not in body else body
    return tokenizer


def texts(tokenizer, prompts=PROMPTS, **more):
    return ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in tokenized(tokenizer, prompts, **more)]


ASKING = {
    "as it is": "{{ m['content'] }}",
    "stripped": "{{ m['content'] | trim }}",
    "blanks made one": "{{ m['content'].split() | join(' ') }}",
    "escaped": "{{ m['content'] | tojson }}",
    "escaped as HTML": "{{ m['content'] | e }}",
    "small letters": "{{ m['content'] | lower }}",
    "parts": PARTS,
    "parts, and a text raises": "{{ m['content'][0]['text'] + '' }}",
    "parts, and a text is refused": "{% if m['content'] is string %}{{ raise_exception('parts') }}{% endif %}" + PARTS,
    "the last turn alone": "{{ messages[-1]['content'] }}",
    "the first turn alone": "{{ messages[0]['content'] }}[assistant]",
    "its own system prompt": "<s>[system] Be kind. {{ messages[0]['content'] }} [assistant]",
}


@pytest.mark.parametrize("body", ASKING.values(), ids=ASKING)
def test_a_template_that_shows_the_prompt_is_used(tokenizer, body):
    first, second = texts(with_template(tokenizer, body))
    assert "how do i bake bread?" in first.lower()
    assert all(word in second for word in ("pick", "lock,"))
    assert "<image>" not in first + second


LOSING = {
    "one text for all": "Hello. ",
    "the prompt cut": "{{ m['content'][:12] }}",
    "the prompt cut, but for a list": "{{ m['content'][:12] if m['content'] is string else m['content'] }}",
    "its end alone": "{{ m['content'][-5:] }}",
    "images alone": "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}",
    "the role alone": "",
}


@pytest.mark.parametrize("body", LOSING.values(), ids=LOSING)
def test_a_template_that_loses_the_prompt_is_refused(tokenizer, body):
    with pytest.raises(ConfigError, match=r"the chat template loses .* set tokenizer\.chat_template .* `template`"):
        tokenized(with_template(tokenizer, body), PROMPTS)


def test_a_short_prompt_that_stands_in_the_templates_own_words_is_no_proof(tokenizer):
    """Every prompt stands in what is written, and none was asked."""
    losing = with_template(tokenizer, "user ")
    with pytest.raises(ConfigError, match="loses the prompt, given as text and given as parts"):
        tokenized(losing, ["user", "s"])


def test_a_prompt_that_is_lost_is_named_by_its_place_and_not_repeated(tokenizer):
    losing = with_template(tokenizer, "{% if 'lock' not in m['content'] %}{{ m['content'] }}{% endif %}")
    with pytest.raises(ConfigError, match="loses prompt 2 of 2") as refused:
        tokenized(losing, PROMPTS)
    assert "lock" not in str(refused.value)


RAISING = {
    "a system prompt required": (
        "{% if m['role'] != 'system' %}{{ raise_exception('a system turn first') }}{% endif %}",
        "TemplateError: a system turn first",
    ),
    "a template error": ("{{ nothing.at.all }}", "UndefinedError"),
    "the second turn alone": ("{{ messages[1]['content'] }}", "UndefinedError"),
    "no syntax": ("{% if %}", "TemplateSyntaxError"),
}


@pytest.mark.parametrize(("body", "words"), RAISING.values(), ids=RAISING)
def test_a_template_that_raises_is_refused_with_its_reason(tokenizer, body, words):
    with pytest.raises(ConfigError, match=f"cannot write a lone user's turn .{words}.*set tokenizer.chat_template"):
        tokenized(with_template(tokenizer, body), PROMPTS)


def test_nothing_is_cut_at_the_length_that_a_tokenizer_remembers(tokenizer):
    with_template(tokenizer, "{{ m['content'] }}")
    tokenizer.backend_tokenizer.enable_truncation(10)
    assert len(tokenized(tokenizer, ["a" * 300])[0]) > 300
    tokenizer.model_max_length = 400
    tokenizer.backend_tokenizer.enable_truncation(10)
    assert len(tokenized(tokenizer, ["a" * 300], "Q: {prompt}")[0]) > 300


def test_the_first_special_token_is_written_once(tokenizer):
    with_template(tokenizer, "<s>{{ messages[0]['content'] }}")
    assert tokenized(tokenizer, ["ab"])[0].count(97) == 1
    assert tokenized(tokenizer, ["ab"], "<s>Q: {prompt}")[0] == tokenized(tokenizer, ["ab"], "Q: {prompt}")[0]
    assert tokenized(tokenizer, ["<s>"], "<s>{prompt}")[0].count(97) == 2, "one that the prompt brings stays"


def test_a_tokenizer_that_cannot_tell_prompts_apart_is_refused(tokenizer):
    built = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    strange = PreTrainedTokenizerFast(tokenizer_object=built, unk_token="[UNK]")
    with pytest.raises(ConfigError, match="makes the same 1 tokens of all 2 prompts: give the tokenizer of this model"):
        tokenized(strange, PROMPTS, "{prompt}")
    assert tokenized(strange, [PROMPTS[0], PROMPTS[0]], "{prompt}") == [[0], [0]]


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_said(tokenizer, tiny_llama):
    with_template(tokenizer, "{{ m['content'] }}")
    with pytest.raises(
        ConfigError, match=r"gives token \d+, and the model has rows for 64: give the tokenizer of this"
    ):
        generate(tiny_llama(vocab_size=64), tokenizer, PROMPTS)


class Processor:
    """As a vision-language model's: a tokenizer, images, and sometimes the only template."""

    def __init__(self, tokenizer, chat_template=None):
        self.tokenizer, self.chat_template, self.image_processor = tokenizer, chat_template, object()


@pytest.mark.parametrize("named", [False, True])
def test_a_processor_is_asked_through_its_tokenizer_in_whichever_template_there_is(tokenizer, named):
    parts = LOOP.replace("BODY", PARTS)
    here = copy.deepcopy(with_template(tokenizer, PARTS))
    expected = texts(here)
    tokenizer.chat_template = None
    processor = Processor(tokenizer, {"default": parts} if named else parts)
    assert [tokenized(processor, PROMPTS), tokenized(Processor(here), PROMPTS)] == [tokenized(here, PROMPTS)] * 2
    asked = Questions.of(processor, {"bad": PROMPTS}, {"good": ["a"]})
    assert asked.tokens["bad"] == tokenized(here, PROMPTS)
    assert all("[assistant]" in text for text in expected)
    with pytest.raises(ConfigError, match="no chat template"):
        tokenized(Processor(tokenizer), PROMPTS)


THINKING = "{{ m['content'] }}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


def test_settings_reach_the_template(tokenizer):
    with_template(tokenizer, THINKING)
    assert all("</think>" not in text for text in texts(tokenizer))
    for given in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        assert all("<think></think>" in text for text in texts(tokenizer, settings=given))
    assert texts(tokenizer, settings={"enable_thinking": True}) == texts(tokenizer)
    other = {"chat_template": LOOP.replace("BODY", "other {{ m['content'] }}")}
    assert all("other How" in text for text in texts(tokenizer, settings=other))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"enable_thinkin": False}, "has 'enable_thinkin', which the chat template never reads"),
        ({"tokenize": True}, "has 'tokenize', which is set by whoever asks"),
        ({1: False}, "give a mapping of what the chat template reads"),
        ("enable_thinking", "chat_template_kwargs 'enable_thinking' is no JSON: .* Give such as"),
        ('{"enable_thinking": true, "enable_thinking": false}', "gives the key 'enable_thinking' twice"),
        (["enable_thinking"], "give a mapping"),
        (False, "chat_template_kwargs is False: give a mapping"),
    ],
)
def test_settings_that_cannot_act_are_refused(tokenizer, given, words):
    with pytest.raises(ConfigError, match=words):
        tokenized(with_template(tokenizer, THINKING), PROMPTS, settings=given)


def test_settings_beside_a_template_of_ones_own_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="stands in its place: give one of the two"):
        tokenized(tokenizer, PROMPTS, "Q: {prompt}", {"enable_thinking": False})
