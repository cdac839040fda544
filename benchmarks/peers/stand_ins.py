"""What the peers' tests fetch from the Hub, made on the spot: tiny models in a cache folder, and rows of text.

The real ones are tiny and random too. A test that asserts on the real ones' own words fails here with the callback and
without; the two runs are compared with each other, not with the Hub's.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

ORG = "trl-internal-testing"
REVISION = "0" * 40
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 4,
}
ROWS = 16
WORDS = ("quick", "brown", "fox", "sees", "a", "lazy", "dog", "under", "some", "old", "tree", "and", "runs", "home")


def model_names(tests: Path) -> list[str]:
    """The Hub ids of text models that the tests name."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in tests.rglob("*.py"))
    names = set(re.findall(rf"{ORG}/(tiny-\w+For(?:CausalLM|SequenceClassification)[\w.-]*)", text))
    return sorted(name.rstrip(".-") for name in names)


def make_models(names: list[str], tokenizer, hub: Path) -> dict[str, str]:
    """Put each model into the Hub's cache layout below `hub`; return name -> reason for those that cannot be made."""
    failed = {}
    for name in names:
        try:
            _make(name, tokenizer, hub)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return failed


def _make(name: str, tokenizer, hub: Path) -> None:
    import torch
    import transformers

    architecture = name.split("-")[1]
    cls = getattr(transformers, architecture)
    known = set(cls.config_class().to_dict())
    settings = {key: value for key, value in SMALL.items() if key in known}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    labels = {"num_labels": 1} if "SequenceClassification" in architecture else {}
    torch.manual_seed(0)
    model = cls(cls.config_class(vocab_size=len(tokenizer), **settings, **special, **labels))
    repo = hub / f"models--{ORG}--{name}"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(REVISION)
    folder = repo / "snapshots" / REVISION
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rows(config: str) -> list[dict]:
    """Rows with the columns of a configuration of the dataset `zen`; KeyError for a configuration that is not made."""
    rng = random.Random(0)

    def say(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

    return [_row(config, say, i) for i in range(ROWS)]


def _row(config: str, say, i: int) -> dict:
    style, _, kind = config.partition("_")
    chat = style == "conversational"
    prompt = [{"role": "user", "content": say(4)}] if chat else say(4)

    def answer(n: int):
        return [{"role": "assistant", "content": say(n)}] if chat else " " + say(n)

    values = {
        "language_modeling": lambda: {"messages": [*prompt, *answer(5)]} if chat else {"text": say(9)},
        "prompt_only": lambda: {"prompt": prompt},
        "prompt_completion": lambda: {"prompt": prompt, "completion": answer(5)},
        "preference": lambda: {"prompt": prompt, "chosen": answer(4), "rejected": answer(6)},
        "implicit_prompt_preference": lambda: (
            {"chosen": [*prompt, *answer(4)], "rejected": [*prompt, *answer(6)]}
            if chat
            else {"chosen": prompt + answer(4), "rejected": prompt + answer(6)}
        ),
        "unpaired_preference": lambda: {"prompt": prompt, "completion": answer(5), "label": i % 2 == 0},
        "stepwise_supervision": lambda: {
            "prompt": say(4),
            "completions": [say(3), say(3)],
            "labels": [True, i % 2 == 0],
        },
    }
    return values[kind]()


def load_stand_in(original):
    """Return a `load_dataset` that makes the rows of `zen`, and leaves every other dataset to `original`."""

    def load_dataset(path, name=None, *args, split=None, streaming=False, **kwargs):
        if path != f"{ORG}/zen":
            return original(path, name, *args, split=split, streaming=streaming, **kwargs)
        from datasets import Dataset, DatasetDict

        whole = Dataset.from_list(rows(name))
        cut = re.search(r"\[:(\d+)\]", split or "")
        whole = whole.select(range(int(cut[1]))) if cut else whole
        if split is None:
            return DatasetDict({"train": whole, "test": whole})
        return whole.to_iterable_dataset() if streaming else whole

    return load_dataset
