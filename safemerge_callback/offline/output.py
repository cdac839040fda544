"""The output folder: whole or not at all, and nobody's files are lost; apart from the merge, which only fills it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..adapters.files import CONFIG, TOKENIZER, WEIGHTS
from ..decision import Edit, MergePlan
from ..errors import AdapterError, ConfigError, shown
from ..io.card import caveat, escaped, front_matter
from ..io.choices import truth
from ..io.outputs import require_writable, same_place
from ..io.paths import as_path
from ..io.whole_file import settle, whole_folder
from ..record import JOURNAL_FILE, PAGE_FILE, Journal

CARD = "README.md"
RECIPE = "safemerge.yaml"
# Of a search of coefficients: every evaluation.
TRACE = "search.jsonl"
_ADAPTER_FILES = {CONFIG, WEIGHTS, JOURNAL_FILE, PAGE_FILE, CARD, RECIPE, TRACE, *TOKENIZER}


def free_output(output: str | Path, inputs: Iterable[object], overwrite: bool, more: Iterable[str] = ()) -> Path:
    """Return the output folder, absolute.

    ConfigError where nothing can be written there, or where writing could cost an input or somebody's files. `more`
    names files that the output will hold beside an adapter's own, which `overwrite` may replace too.
    """
    allowed = truth(overwrite, "overwrite")
    target = as_path(output, "output").resolve()
    with suppress(OSError):
        settle(target)
    for part in inputs:
        source = getattr(part, "source", None) or getattr(part, "path", None) or part
        if same_place(source, target):
            raise ConfigError(f"output {str(output)!r} is one of the inputs: give a new folder.")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"output {shown(output)} is no folder: give a new folder.")
    names = {path.name for path in target.iterdir()} if target.exists() else set()
    if names and not allowed:
        raise ConfigError(f"output {str(output)!r} is not empty: give a new folder, or ask to overwrite it (--force).")
    if foreign := sorted(names - _ADAPTER_FILES - {*more}):
        raise ConfigError(
            f"output {str(output)!r} holds {len(foreign)} things that are no part of an adapter, first {foreign[0]!r}: "
            "it is not overwritten. Give a new folder."
        )
    require_writable(target, "output")
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give an absent folder beside `target`, which takes its place at the end of the `with`; after an error it is gone.

    Raises AdapterError where the disk refuses; an existing `target` is then as it was.
    """
    try:
        with whole_folder(target) as aside:
            yield aside
    except OSError as error:
        raise AdapterError(f"output {str(target)!r} cannot be written: {error}. Nothing was left there.") from error


def write_journal(folder: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write the journal of a merge of files into `folder`."""
    journal = Journal(folder / JOURNAL_FILE)
    for entry in entries:
        journal.append(entry)


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
    return "\n".join([*lines, "", f"Every reading and reason is in `{JOURNAL_FILE}`. {caveat()}", ""])
