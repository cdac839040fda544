r"""H3Fusion without its router: experts for helpful, harmless and honest answers fused into one plain LoRA.

    python -m recipes.fuse_experts --experts helpful=A harmless=B honest=C \
        --rows helpful=helpful.jsonl harmless=harmless.jsonl honest=honest.jsonl -o FUSED

Each expert is a LoRA of the same base and modules (`recipes/train_safety_adapter.py` trains one of any data; its
configs smollm2_helpful, smollm2_harmless and smollm2_honest train these three on the embedded model), and each has rows
of its type, prompts with responses to keep: a file, or the name of a data set of the recipes. A weight an expert and
module is learned on them (`signals/expert_weights.py`), and the fused adapter is written, with the weights in its
README.md. Source: H3Fusion, arXiv:2411.17792; what one plain LoRA loses against its router stands there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.command import run_command
from recipes.data import EXAMPLES, load_examples
from recipes.models import checkpoint
from safemerge_callback.adapters import load_adapter
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import load_rows
from safemerge_callback.evaluation.loading import load_subject
from safemerge_callback.offline.fuse import fuse_adapters, fusion_output
from safemerge_callback.signals.expert_weights import ExpertSettings, ExpertWeights, learn_expert_weights
from safemerge_callback.signals.rows import SafetyRow, row_tokens

# Tokens of a response that a weight is learned from.
FIRST_TOKENS = 32
# Rows of a named data set.
NUM_ROWS = 64


def named(pairs: Sequence[str], what: str) -> dict[str, str]:
    """Return NAME=VALUE words as a mapping; ConfigError for another word, or a name that stands twice."""
    parts = [pair.partition("=") for pair in pairs]
    values = {name: value for name, _, value in parts}
    if len(values) < len(parts) or not all(name and value for name, value in values.items()):
        raise ConfigError(f"{what} are {list(pairs)}: give NAME=VALUE for each, every name once")
    return values


def fuse(
    experts: dict[str, str],
    rows: dict[str, str],
    output: str,
    *,
    base: str | None = None,
    method: str = "cat",
    settings: ExpertSettings | None = None,
    device: str | None = None,
) -> ExpertWeights:
    """Learn the weights of `experts`, name -> adapter, on `rows`, name -> file, and write the fused adapter."""
    if list(experts) != list(rows):
        raise ConfigError(f"experts are {list(experts)} and rows are of {list(rows)}: name both alike, in one order")
    fusion_output(list(experts.values()), output, method)
    tables = {name: typed_rows(file) for name, file in rows.items()}
    first, *others = experts.values()
    subject = load_subject(first, base=base and checkpoint(base), device=device)
    updates = [_updates(other, subject.model) for other in others]
    tokens = {name: row_tokens(subject.tokenizer, table, first_tokens=FIRST_TOKENS) for name, table in tables.items()}
    learned = learn_expert_weights(subject.model, updates, tokens, settings)
    fuse_adapters(list(experts.values()), learned.weights, output, method=method)
    return learned


def typed_rows(source: str) -> Sequence[SafetyRow]:
    """Return the rows of a file or of the Hub, or of a data set of the recipes by name, at most `NUM_ROWS`."""
    # A word alone is no file of rows, which has an ending, and no id of the Hub's, which are org/name.
    if source.partition(":")[0] not in EXAMPLES and ("/" in source or Path(source).suffix):
        return load_rows(source, both=False)
    rows = load_examples(source)[:NUM_ROWS]
    return [SafetyRow(row["prompt"][-1]["content"], row["completion"][0]["content"], "benign") for row in rows]


def _updates(adapter: str, model: Any) -> dict[str, Any]:
    """The whole updates of an adapter's modules, where and as precise as the model is."""
    like = next(model.parameters())
    factors = load_adapter(adapter).factors
    updates = {name: one.low_rank(unit=1.0) for name, one in factors.items()}
    return {name: type(one)(one.A.to(like), one.B.to(like)) for name, one in updates.items()}


def main(args: Sequence[str] | None = None) -> None:
    """Fuse as the command line says, and print what each expert weighs."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--experts", nargs="+", required=True, help="NAME=ADAPTER, the first one's heads are kept")
    words.add_argument("--rows", nargs="+", required=True, help="NAME=FILE of rows, or NAME=DATA, in the same order")
    words.add_argument("-o", "--output", required=True, help="folder of the fused adapter")
    words.add_argument("--base", help="the experts' base model; left out: what the first one names")
    words.add_argument("--method", default="cat", help="cat: ranks add up; linear: cut to the first one's rank")
    words.add_argument("--steps", type=int, default=ExpertSettings.steps)
    words.add_argument("--norm-weights", type=float, nargs="*", default=(), help="penalty on each expert's norm")
    options = words.parse_args(args)
    experts = named(options.experts, "experts")
    settings = ExpertSettings(steps=options.steps, norm_weights=tuple(options.norm_weights))
    how = {"base": options.base, "method": options.method, "settings": settings}
    learned = fuse(experts, named(options.rows, "rows"), options.output, **how)
    for place, name in enumerate(experts):
        weights = [row[place] for row in learned.weights.values()]
        print(f"{name}: {sum(weights) / len(weights):.3f} on average, {min(weights):.3f} to {max(weights):.3f}")
    print(f"objective {learned.before:.4f} evenly, {learned.after:.4f} learned, in {learned.seconds:.1f} s")


if __name__ == "__main__":
    run_command(main)
