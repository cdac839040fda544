"""Our own greedy decoding says token by token what transformers' `generate` says, and leaves to it what it must."""

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safemerge_callback.signals import greedy, responses
from safemerge_callback.signals.greedy import beginning_of, continued, plain_decoder, portions
from safemerge_callback.signals.responses import _continue, continuations
from tests.support.world import SIZES, with_lora

BIG = {"initializer_range": 0.6, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **BIG}
MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **BIG}
ALIKE = {**SIZES, **BIG}
PLAIN = {
    "Llama": ("LlamaForCausalLM", ALIKE),
    "Llama, eager": ("LlamaForCausalLM", {**ALIKE, "attn_implementation": "eager"}),
    "Qwen2": ("Qwen2ForCausalLM", ALIKE),
    "Gemma": ("GemmaForCausalLM", {**ALIKE, "num_key_value_heads": 1, "head_dim": 8}),
    "GPT2": ("GPT2LMHeadModel", GPT2),
    "GPTNeoX": ("GPTNeoXForCausalLM", ALIKE),
    "OPT": ("OPTForCausalLM", {**ALIKE, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.6}),
}
OTHERS = {
    "a sliding window": ("MistralForCausalLM", {**ALIKE, "sliding_window": 4}),
    "windows in some layers": ("Gemma2ForCausalLM", {**ALIKE, "head_dim": 8, "sliding_window": 4}),
    "a state in place of a cache": ("MambaForCausalLM", MAMBA),
    "experts": ("MixtralForCausalLM", {**ALIKE, "sliding_window": None, "num_local_experts": 2}),
}
PROMPTS = [
    [1, 5, 9, 4],
    [1, 5, 9, 7, 8, 33, 12, 5, 5, 9],
    [1, 5, 3, 9],
    [1, 5, 9],
    [1, 5, 61, 60, 59, 58, 57],
    [1, 5, 9, 4],
]


def made(family, dtype=torch.float32):
    name, sizes = {**PLAIN, **OTHERS}[family]
    cls = getattr(transformers, name)
    how = {"attn_implementation": sizes["attn_implementation"]} if "attn_implementation" in sizes else {}
    torch.manual_seed(0)
    config = cls.config_class(**{key: value for key, value in sizes.items() if key not in how})
    return cls._from_config(config, **how).to(dtype).eval()


def generated(model, prompts, ends, new):
    """What `generate` says, prompt by prompt, up to and with its end."""
    said = [_continue(model, [prompt], ends, new, None)[0] for prompt in prompts]
    return [ids[: next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))] for ids in said]


def own(model, prompts, ends, new, batch_size):
    said = dict(continued(beginning_of(plain_decoder(model), prompts), prompts, ends, new, batch_size))
    assert sorted(said) == list(range(len(prompts)))
    return [said[place] for place in range(len(prompts))]


# Eager attention in float64 gives NaN for rows that are padded, in `generate` as here: its softmax is float32's.
@pytest.mark.parametrize(
    ("family", "dtype"),
    [(f, d) for f in PLAIN for d in (torch.float32, torch.float64) if (f, d) != ("Llama, eager", torch.float64)],
)
@torch.no_grad()
def test_the_tokens_are_those_of_generate(family, dtype):
    model = made(family, dtype)
    for prompts in (PROMPTS, [[place, *prompt] for place, prompt in enumerate(PROMPTS, 3)], PROMPTS[:1]):
        first = generated(model, prompts, [], 9)
        ends = [2, first[0][2], first[-1][4]]
        expected = generated(model, prompts, ends, 9)
        assert len(set(map(tuple, first))) > len(prompts) // 2, "the prompts must tell the responses apart"
        for batch_size in (1, 2, 5, 32):
            assert own(model, prompts, ends, 9, batch_size) == expected


@pytest.fixture(scope="module")
def llama():
    return made("Llama", torch.float64)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    beginning=st.lists(st.integers(0, 63), max_size=6),
    rests=st.lists(st.lists(st.integers(0, 63), min_size=1, max_size=9), min_size=1, max_size=9),
    ends=st.lists(st.integers(0, 63), max_size=12),
    new=st.integers(1, 12),
    batch_size=st.integers(1, 10),
)
def test_whatever_the_prompts_the_batch_and_the_ends(llama, beginning, rests, ends, new, batch_size):
    prompts, ends = [beginning + rest for rest in rests], [2, *ends]
    assert own(llama, prompts, ends, new, batch_size) == generated(llama, prompts, ends, new)


@pytest.mark.parametrize("family", OTHERS)
def test_what_is_no_plain_decoder_is_left_to_generate(family, chat_tokenizer, monkeypatch):
    model = made(family)
    assert plain_decoder(model) is None
    monkeypatch.setattr(greedy, "continued", None)
    said = continuations(model, chat_tokenizer, PROMPTS, max_new_tokens=6)
    assert said == generated(model, PROMPTS, [2], 6)


def test_layers_that_are_known_by_their_cache_alone_are_left_to_generate(llama, monkeypatch):
    class DynamicSlidingWindowLayer:
        pass

    output = type("Output", (), {"past_key_values": type("Cache", (), {"layers": [DynamicSlidingWindowLayer()]})})
    monkeypatch.setattr(greedy, "_pass", lambda *_: output)
    assert beginning_of(llama, PROMPTS) is None
    output.past_key_values = None
    assert beginning_of(llama, PROMPTS) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"repetition_penalty": 1.3},
        {"suppress_tokens": [5]},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 2},
        {"min_new_tokens": 3},
        {"forced_eos_token_id": 2},
        {"return_dict_in_generate": True},
        {"cache_implementation": "static"},
    ],
)
def test_settings_that_change_what_is_said_are_left_to_generate(changed):
    model = made("Llama")
    assert plain_decoder(model) is model
    for name, value in {"repetition_penalty": 1.0, "num_beams": 1, "temperature": 0.6, "do_sample": True}.items():
        setattr(model.generation_config, name, value)
    assert plain_decoder(model) is model, "what only sampling reads, and what says what is so anyway"
    for name, value in changed.items():
        setattr(model.generation_config, name, value)
    assert plain_decoder(model) is None


def test_ranks_that_wait_for_each_other_are_left_to_generate(llama, chat_tokenizer, monkeypatch):
    synced = []
    monkeypatch.setattr(responses, "_continue", lambda *given: synced.append(given[-1]) or [[3, 2]] * len(given[1]))
    assert continuations(llama, chat_tokenizer, PROMPTS, synced=True) == [[3, 2]] * len(PROMPTS)
    assert synced == [True]


def test_an_adapter_is_heard_and_virtual_tokens_are_left_to_generate(llama, chat_tokenizer):
    from peft import PromptTuningConfig, get_peft_model

    model = with_lora(made("Llama", torch.float64), ["q_proj", "v_proj"], init_lora_weights=False).double().eval()
    assert plain_decoder(model) is model.get_base_model()
    expected = generated(model, PROMPTS, [2], 6)
    assert own(model, PROMPTS, [2], 6, 3) == expected != generated(llama, PROMPTS, [2], 6)
    with model.disable_adapter():
        assert own(model, PROMPTS, [2], 6, 3) == generated(llama, PROMPTS, [2], 6)
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert plain_decoder(get_peft_model(made("Llama"), virtual)) is None


def test_in_training_nothing_is_left_behind(llama, chat_tokenizer):
    model = with_lora(made("Llama"), ["q_proj"], lora_dropout=0.5).train()
    base = model.get_base_model()
    newer = hasattr(base, "activation_checkpointing_enable")
    (base.activation_checkpointing_enable if newer else base.gradient_checkpointing_enable)()
    expected = generated(made("Llama"), PROMPTS, [2], 5)
    state = torch.get_rng_state()
    assert continuations(model, chat_tokenizer, PROMPTS, max_new_tokens=5) == expected
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    ids = torch.tensor(PROMPTS[:1])
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_within_autocast_the_dtype_is_that_of_generate(llama):
    model = made("Llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert own(model, [PROMPTS[1]], [2], 9, 1) == generated(model, [PROMPTS[1]], [2], 9)


def test_rows_that_have_ended_cost_nothing_and_others_take_their_place(llama, monkeypatch):
    passes = []
    original = greedy._pass

    def counted(decoder, ids, mask, cache):
        passes.append((tuple(ids.shape), mask.shape[1]))
        return original(decoder, ids, mask, cache)

    monkeypatch.setattr(greedy, "_pass", counted)
    prompts = [[1, 5, 9, *[first] * 3] for first in range(3, 43)]
    first = generated(llama, prompts, [], 8)
    ends = sorted({ids[1] for ids in first[:20]})
    said = own(llama, prompts, ends, 8, 8)
    assert said == generated(llama, prompts, ends, 8)
    (shared, _), *others = passes
    assert shared == (1, 3)
    assert max(rows for (rows, _), _ in others) <= 8
    assert max(columns for _, columns in others) <= 6 + 8
    tokens = sum(rows * columns for (rows, columns), _ in others)
    assert tokens == 3 * len(prompts) + sum(len(ids) - 1 for ids in said)


def test_portions_hold_every_place_once_the_longest_first():
    lengths = [3, 700, 20, 20, 1, 90]
    assert portions(lengths, 32) == [[1], [5, 2, 3, 0, 4]]
    assert portions(lengths, 8) == [[1], [5, 2], [3, 0], [4]]
    assert portions([5, 5], 1) == [[0], [1]]
