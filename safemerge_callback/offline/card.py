"""A model card: what was merged into what, by which rule, module by module."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..decision import JOURNAL_FILE, Edit, MergePlan

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def model_card(plan: MergePlan, edits: Sequence[Edit], parts: Mapping[str, str | None], base_model: str | None) -> str:
    """Return README.md; `parts` names what was put together. Names from outside are escaped."""
    how = plan.how.removeprefix("method ")
    facts = {**parts, "gate": str(plan.rule), "method": how, "modules": f"{len(edits)} of {len(plan.readings)}"}
    rows = [f"| {key.replace('_', ' ')} | {_escaped(value)} |" for key, value in facts.items() if value]
    modules = [
        f"| {_escaped(e.name)} | {plan.readings[e.name].cosine:.4f} | {plan.readings[e.name].null_cosine:.4f} "
        f"| {e.change:.4f} | {e.residual:.4f} |"
        for e in edits
    ]
    head = ["| module | cosine | null cosine | change | residual |", "|---|---:|---:|---:|---:|"]
    lines = [_front_matter(base_model), "# Merged LoRA adapter\n", "## Safety merge\n", "| | |", "|---|---|", *rows, ""]
    lines += [*head, *modules] if modules else ["No module was selected: the weights are the fine-tuned adapter's."]
    return "\n".join([*lines, "", f"Every reading and reason is in `{JOURNAL_FILE}`. {_CAVEAT}", ""])


_CAVEAT = (
    "The merge answers accidental loss of safety in fine-tuning; it does not withstand an attack: evaluate before use."
)


def _front_matter(base_model: str | None) -> str:
    # A JSON string is a YAML string. A local path is no model id, which the Hub would refuse.
    known = base_model is not None and _HUB_ID.fullmatch(base_model) and not Path(base_model).exists()
    base = f"base_model: {json.dumps(base_model)}\n" if known else ""
    return f"---\n{base}library_name: peft\ntags:\n- lora\n- safemerge\n---\n"


def _escaped(text: str) -> str:
    """`text` as one line of Markdown that renders as itself, inside a table too."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_\[\](){}<>|~#&!$])", r"\\\1", one_line)
