"""A model card: what was merged into what, by which rule, module by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..decision import Edit, MergePlan
from ..record import JOURNAL_FILE
from ..record.card import CAVEAT, escaped, front_matter


def model_card(
    plan: MergePlan,
    edits: Sequence[Edit],
    parts: Mapping[str, str | None],
    base_model: str | None,
    baked: bool = False,
) -> str:
    """Return README.md of a merged adapter, or of a model that it was `baked` into.

    `parts` names what was put together. Names from outside are escaped.
    """
    facts = {**parts, "gate": str(plan.gate), "method": plan.words.removeprefix("method ")}
    facts["modules"] = f"{len(edits)} of {len(plan.readings)}"
    if edits:
        facts["largest residual"] = f"{max(edit.residual for edit in edits):.4f}"
    rows = [f"| {key.replace('_', ' ')} | {escaped(value)} |" for key, value in facts.items() if value]
    modules = [
        f"| {escaped(e.name)} | {plan.readings[e.name].cosine:.4f} | {plan.readings[e.name].null_cosine:.4f} "
        f"| {e.change:.4f} | {e.residual:.4f} |"
        for e in edits
    ]
    head = ["| module | cosine | null cosine | change | residual |", "|---|---:|---:|---:|---:|"]
    title = "# Model with a merged LoRA adapter added in\n" if baked else "# Merged LoRA adapter\n"
    lines = [front_matter(base_model, baked), title, "## Safety merge\n", "| | |", "|---|---|", *rows, ""]
    lines += [*head, *modules] if modules else ["No module was selected: the weights are the fine-tuned adapter's."]
    return "\n".join([*lines, "", f"Every reading and reason is in `{JOURNAL_FILE}`. {CAVEAT}", ""])
