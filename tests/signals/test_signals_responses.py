import copy
import random
import warnings

import pytest
import torch

from safemerge_callback.errors import ConfigError
from safemerge_callback.signals import generate
from safemerge_callback.signals.responses import respond, tokenized
from tests.support.answers import one_by_one

PROMPTS = ["a", "b c d e f g h", "x y", "q w e r t", "z z z z z z z z z z z", "m n", "o"]


@pytest.fixture
def tokenizer(chat_tokenizer):
    return chat_tokenizer


@pytest.fixture
def model(talking_llama):
    return talking_llama


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_responses_are_those_of_plain_argmax_whatever_the_batch(model, tokenizer, batch_size):
    expected = [one_by_one(model, tokenizer, prompt, 9) for prompt in PROMPTS]
    assert len(set(expected)) > 4, "the prompts must tell the responses apart"
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=9, batch_size=batch_size) == expected


def test_a_response_ends_at_the_end_of_its_turn(model, tokenizer):
    """Some end early in a batch where others go on: what fills the rest is not part of a response."""
    whole = [one_by_one(model, tokenizer, prompt, 1) for prompt in PROMPTS]
    first = tokenizer.convert_tokens_to_ids(whole[1])
    model.generation_config.eos_token_id = [2, first]
    said = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert said[1] == ""
    assert [text.split()[0] for text, word in zip(said, whole, strict=True) if word not in ("", whole[1])] == [
        word for word in whole if word not in ("", whole[1])
    ]
    assert all(whole[1] not in text.split() for text in said)


def test_sampling_settings_of_a_checkpoint_neither_matter_nor_warn(model, tokenizer):
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    settings = {"do_sample": True, "temperature": 9.0, "top_p": 0.5, "top_k": 3, "max_length": 5, "use_cache": False}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.config.use_cache = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == expected
    assert caught == []


def test_nothing_is_logged(model, tokenizer, caplog, capsys):
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        model.generation_config.temperature = 0.6
        generate(model, tokenizer, PROMPTS, max_new_tokens=4)
    finally:
        logging.disable_propagation()
    assert caplog.messages == []
    assert capsys.readouterr().out == ""


def test_each_module_goes_back_to_the_mode_it_was_in(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    generate(model, tokenizer, PROMPTS[:2], max_new_tokens=2)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert {True, False} == set(before.values())

    def fails(**_):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("out of memory")

    model.generate = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, tokenizer, PROMPTS[:2], max_new_tokens=2)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_dropout_is_off_and_the_random_state_untouched(tiny_llama, tokenizer):
    model = tiny_llama(vocab_size=64, attention_dropout=0.9, initializer_range=0.6)
    quiet = generate(model.eval(), tokenizer, PROMPTS, max_new_tokens=6)
    state = torch.get_rng_state()
    assert generate(model.train(), tokenizer, PROMPTS, max_new_tokens=6) == quiet
    assert torch.equal(torch.get_rng_state(), state)


def test_training_goes_on_after_an_evaluation(model, tokenizer):
    generate(model.train(), tokenizer, PROMPTS[:2], max_new_tokens=2)
    ids = torch.tensor([[1, 3, 5, 6]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_tokenizer_without_a_chat_template_is_refused(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        generate(model, bare, PROMPTS)


def test_a_template_of_ones_own_takes_the_place_of_the_chat_template(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    assert tokenized(bare, ["a b"], "w1 {prompt} w2 {x}") == [bare("w1 a b w2 {x}")["input_ids"]]
    assert tokenized(bare, [], "w1 {prompt}") == []
    with pytest.raises(ConfigError, match=r"'w1' has no place for the prompt: put \{prompt\}"):
        tokenized(bare, ["a"], "w1")


def test_tokens_of_a_response_are_counted_without_its_end(model, tokenizer):
    asked = tokenized(tokenizer, PROMPTS)
    found = respond(model, tokenizer, asked, max_new_tokens=9)
    assert [r.text for r in found] == generate(model, tokenizer, PROMPTS, max_new_tokens=9)
    assert [r.tokens for r in found] == [len(tokenizer(r.text)["input_ids"]) for r in found]
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(found[0].text.split()[0])
    assert respond(model, tokenizer, asked[:1], max_new_tokens=9) == [("", 0)]


def test_gradient_checkpointing_neither_matters_nor_warns(model, tokenizer):
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    newer = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable)()
    model.config.use_cache = False
    python = random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model.train(), tokenizer, PROMPTS, max_new_tokens=6) == expected
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert model.config.use_cache is False
    assert random.getstate() == python
