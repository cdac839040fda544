"""A model card: what was merged into what, by which rule, module by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..decision import JOURNAL_FILE, Edit, MergePlan
from ..decision.card import CAVEAT, escaped, front_matter


def model_card(plan: MergePlan, edits: Sequence[Edit], parts: Mapping[str, str | None], base_model: str | None) -> str:
    """Return README.md; `parts` names what was put together. Names from outside are escaped."""
    how = plan.how.removeprefix("method ")
    facts = {**parts, "gate": str(plan.rule), "method": how, "modules": f"{len(edits)} of {len(plan.readings)}"}
    rows = [f"| {key.replace('_', ' ')} | {escaped(value)} |" for key, value in facts.items() if value]
    modules = [
        f"| {escaped(e.name)} | {plan.readings[e.name].cosine:.4f} | {plan.readings[e.name].null_cosine:.4f} "
        f"| {e.change:.4f} | {e.residual:.4f} |"
        for e in edits
    ]
    head = ["| module | cosine | null cosine | change | residual |", "|---|---:|---:|---:|---:|"]
    lines = [front_matter(base_model), "# Merged LoRA adapter\n", "## Safety merge\n", "| | |", "|---|---|", *rows, ""]
    lines += [*head, *modules] if modules else ["No module was selected: the weights are the fine-tuned adapter's."]
    return "\n".join([*lines, "", f"Every reading and reason is in `{JOURNAL_FILE}`. {CAVEAT}", ""])
