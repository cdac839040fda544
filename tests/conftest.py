"""Shared by all tests: shapes on floor 0 are checked, the hub is off, models are made on the spot."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("DO_NOT_TRACK", "1")
# Read once, when any library first imports trackio.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")

import pytest
from jaxtyping import install_import_hook

install_import_hook("safemerge_callback.ops", "beartype.beartype")

import torch  # noqa: E402 - after the hook, which only sees what is imported later


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama():
    """A factory of randomly initialised two-layer Llamas; keywords override the config."""
    return _factory("Llama", num_key_value_heads=4)


@pytest.fixture
def tiny_qwen2():
    """Two-layer Qwen2: grouped-query attention and biases on q, k, v."""
    return _factory("Qwen2", num_key_value_heads=2)


@pytest.fixture
def tiny_gemma():
    """Two-layer Gemma: output head tied to the embedding."""
    return _factory("Gemma", num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)


def _factory(family, **defaults):
    def make(seed=0, **overrides):
        import transformers

        sizes = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        config = getattr(transformers, f"{family}Config")(**{**sizes, **defaults, **overrides})
        torch.manual_seed(seed)
        return getattr(transformers, f"{family}ForCausalLM")(config)

    return make


@pytest.fixture(scope="session")
def chat_tokenizer():
    """One token a word, 64 of them, a chat template, and SmolLM2's trait: the end of a turn also pads."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "<end>", "user", "bot", *"abcdefghijklmnopqrstuvwxyz", "positive", "negative", "yes"]
    words += [f"w{i}" for i in range(64 - len(words))]
    template = (
        "{% for m in messages %}<s> {{ 'user' if m.role == 'user' else 'bot' }} {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<s> bot{% endif %}"
    )
    built = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=built, eos_token="<end>", pad_token="<end>", unk_token="<pad>", chat_template=template
    )
