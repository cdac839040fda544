"""A merge whose coefficients a few rows choose: searched on a loaded model, written as a merge of files.

The only verb on adapters that loads a model: what a merge does to a loss cannot be read off its factors.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..adapters import Adapter, LoraFactors
from ..adapters.files import CONFIG, WEIGHTS
from ..decision.fit import check_safety_adapter
from ..errors import ConfigError
from ..evaluation.harvest import check_lengths
from ..evaluation.loading import load_subject
from ..evaluation.questions import load_questions
from ..io.addresses import source_name
from ..io.bars import bars_shown
from ..io.choices import one_of
from ..live import live_factors
from ..live.fingerprint import digest
from ..live.merged_forward import whole_updates
from ..ops import LowRank
from ..signals.adapter_off import adapter_off
from ..signals.answers import answered_tokens
from ..signals.chat import template_settings
from ..signals.coefficients import Learned, SearchSettings, learn_weights, search_rows
from ..signals.merge_problem import Evaluation, MergedModel, SearchRows
from ..signals.responses import check_vocabulary
from ..signals.rows import KINDS, RowTokens, SafetyRow
from ..subspace import Subspace
from .candidates import clusters, is_equal
from .merge import merge_adapters
from .output import TRACE, free_output, new_folder
from .parts import AdapterSource, adapter_of, adapters_of, listed, subspace_of
from .search_report import Achieved, SearchReport
from .search_trace import Trace, trace_beside
from .small_files import copy_tokenizer

# Methods whose result is the sum that is searched: cut to the live rank, or whole. Without an adapter it is a pull.
METHODS = ("linear", "cat")
ROWS = 64


class Opening(NamedTuple):
    """How the model is opened and asked, as `load_subject`; `base` None: what the adapter's config names."""

    base: str | None = None
    dtype: str = "auto"
    device: str | None = None
    chat_template_kwargs: Mapping[str, Any] | str | None = None


class _Opened(NamedTuple):
    """The loaded model, its live factors, the rows as tokens, and the other updates by label, on its device."""

    model: Any
    live: Mapping[str, LoraFactors]
    task: Sequence[RowTokens]
    safety: Sequence[RowTokens]
    others: Mapping[str, Mapping[str, LowRank]]


def search_merge(
    finetuned: str | Path,
    safety: AdapterSource | Sequence[AdapterSource] | None,
    subspace: str | Path | Subspace,
    output: str | Path,
    *,
    task_rows: Any,
    safety_rows: Any,
    settings: SearchSettings | None = None,
    method: str = METHODS[0],
    rows: int = ROWS,
    opening: Opening | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> SearchReport:
    """Learn the coefficients of a merge from rows, carry it out, and return what came of it.

    finetuned: the adapter's folder or Hub id; its model is loaded, once. safety: adapters whose updates may be merged
        in, none for a pull toward the aligned model. Of adapters at a cosine of 0.95 or more one is tried.
    task_rows, safety_rows: as `load_questions`; `rows` of each at most, by the settings' seed. Where a row has no
        response the fine-tuned model writes the former's, and the aligned one the latter's.
    output: a new folder, as `merge_adapters` writes it, whose `safemerge.yaml` makes the same merge without a search,
        and `search.jsonl`, every evaluation. That file lies beside it while the search runs: one that was killed goes
        on from there. Where no coefficient lowers the objective, the folder holds the fine-tuned adapter's own files,
        and no YAML. `method`: linear, which cuts the sum to the live rank, or cat.
    Raises ConfigError for settings, rows and outputs that cannot be, and where all adapters are the fine-tuned one;
    otherwise as `merge_adapters` and `load_subject`; nothing is written then but the trace.
    """
    settings, sources = settings or SearchSettings(), listed(safety)
    one_of(method, METHODS, "method", problem="has another result than the sum that is searched")
    questions = _questions(task_rows, safety_rows, settings, rows)
    target = free_output(output, [finetuned, *sources, subspace, task_rows, safety_rows], overwrite)
    adapters, matrices = adapters_of(sources), subspace_of(subspace)
    opened = _open(str(finetuned), adapters, questions, opening or Opening(), settings, progress)
    trace = Trace(trace_beside(target), _about(settings, opened))
    kinds = search_rows(opened.model, opened.task, opened.safety, settings)
    learned = _learn(opened, kinds, settings, trace, progress)
    achieved = None
    if learned.improved:
        merged = dict(zip(opened.others, sources, strict=True))
        used, knobs = _weights(learned)
        knobs["method"] = method if sources else "pull"
        parts = [merged[label] for label in used]
        merge_adapters(finetuned, parts, matrices, output, gate="all", overwrite=overwrite, **knobs)
        achieved = _achieved(opened, kinds, settings, target)
    else:
        _write_untouched(adapter_of(finetuned), target)
    shutil.move(trace.path, target / TRACE)
    counts = (len(opened.task), len(opened.safety), len(trace.known))
    return SearchReport(learned, settings, target, *counts, achieved, _peak_bytes(opened.model))


def _questions(
    task_rows: Any, safety_rows: Any, settings: SearchSettings, count: int
) -> tuple[list[SafetyRow], list[SafetyRow]]:
    """Rows of both kinds, `count` of each at most; ConfigError where the objective needs responses that are absent."""
    draw = random.Random(settings.seed)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"rows is {count!r}: give a whole number, 1 or more")
    chosen = []
    for source, what, kind in ((task_rows, "task rows", KINDS[1]), (safety_rows, "safety rows", None)):
        table = load_questions(source, what, kind)
        some = draw.sample(table, min(count, len(table)))
        bare = next((at for at, row in enumerate(some, 1) if not row.response), None)
        if settings.kind.responses and bare is not None:
            raise ConfigError(
                f"objective {settings.objective!r} reads responses, and {what} have prompts without: add a column "
                "completion or response, or choose 'kl', which needs none"
            )
        chosen.append(some)
    if len(kinds := {row.kind for row in chosen[1]}) == 1:
        warnings.warn(
            f"safemerge: all {len(chosen[1])} safety rows are of kind {kinds.pop()!r}, so one side of safety is not "
            "seen, refusals or answers to harmless prompts: add rows of the other kind",
            stacklevel=3,
        )
    return chosen[0], chosen[1]


def _open(
    finetuned: str,
    adapters: Sequence[Adapter],
    questions: tuple[Sequence[SafetyRow], Sequence[SafetyRow]],
    opening: Opening,
    settings: SearchSettings,
    progress: bool,
) -> _Opened:
    subject = load_subject(finetuned, base=opening.base, dtype=opening.dtype, device=opening.device)
    model, live = subject.model, live_factors(subject.model)
    for adapter in adapters:
        check_safety_adapter(adapter, live)
    how: dict[str, Any] = {
        "settings": template_settings(opening.chat_template_kwargs),
        "batch_size": settings.batch_size,
        "label": "answers" if progress else None,
    }
    task = answered_tokens(model, subject.tokenizer, questions[0], **how)
    with adapter_off(model):
        safety = answered_tokens(model, subject.tokenizer, questions[1], **how)
    whole = [[*row.prompt, *row.response] for row in (*task, *safety)]
    check_vocabulary(model, whole)
    check_lengths(model, whole, 0)
    updates = (whole_updates(adapter.factors, live) for adapter in adapters)
    return _Opened(model, live, task, safety, dict(zip(_labels(adapters), updates, strict=True)))


def _labels(adapters: Sequence[Adapter]) -> list[str]:
    """A name an adapter, each another."""
    labels: list[str] = []
    for place, adapter in enumerate(adapters, 1):
        name = source_name(adapter.source) if Path(adapter.source).expanduser().exists() else adapter.source
        labels.append(name if name not in labels else f"{name} ({place})")
    return labels


def _about(settings: SearchSettings, opened: _Opened) -> dict[str, Any]:
    """What a search is of: other settings, adapters or rows are another search."""
    rows = hashlib.sha256(repr([tuple(opened.task), tuple(opened.safety)]).encode()).hexdigest()[:16]
    others = {
        label: digest({name: LoraFactors(name, *one, 1.0) for name, one in update.items()})
        for label, update in opened.others.items()
    }
    return {"settings": asdict(settings), "finetuned": digest(opened.live), "others": others, "rows": rows}


def _learn(
    opened: _Opened, kinds: tuple[SearchRows, SearchRows], settings: SearchSettings, trace: Trace, progress: bool
) -> Learned:
    live = {name: factors.low_rank(unit=1.0) for name, factors in opened.live.items()}
    others = {label: update for label, update in opened.others.items() if not is_equal(live, update)}
    if opened.others and not others:
        raise ConfigError(
            f"safety adapters {list(opened.others)}: each is the fine-tuned adapter itself, so no weights between them "
            "can be told apart: give others, or none for a pull"
        )
    labels = list(others)
    near = {labels[at]: place for place, group in enumerate(clusters(list(others.values()))) for at in group}
    with _noted(trace, progress) as note:
        learned = learn_weights(opened.model, others, kinds, settings, clusters=near, known=trace.known, note=note)
    equal = [
        f"{label}: it is the fine-tuned adapter itself, so it is not tried" for label in opened.others.keys() - others
    ]
    learned.notes[:0] = equal
    return learned


@contextmanager
def _noted(trace: Trace, progress: bool) -> Iterator[Callable[[Evaluation], None]]:
    """Write each evaluation, and show it on a bar."""
    from tqdm import tqdm

    with tqdm(desc="search", unit=" evaluations", disable=not (progress and bars_shown())) as bar:

        def note(evaluation: Evaluation) -> None:
            trace.add(evaluation)
            bar.set_postfix_str(f"{evaluation.stage}: J {evaluation.value:.4f}")
            bar.update()

        yield note


def _weights(learned: Learned) -> tuple[list[str], dict[str, Any]]:
    """The updates that weigh anything, and the knobs of `merge_adapters`: of all modules, and each module's if many."""
    labels = learned.labels
    used = [place for place in range(len(labels)) if any(row[1 + place] for row in learned.weights.values())]
    columns = [0, *(1 + place for place in used)] if labels else [0, 1]
    rows = {name: tuple(row[column] for column in columns) for name, row in learned.weights.items()}
    means = [sum(column) / len(rows) for column in zip(*rows.values(), strict=True)]
    knobs: dict[str, Any] = {"weights": means} if labels else {"strength": means[1]}
    if len(set(rows.values())) > 1:
        # The first pattern that fits counts, and a name's end fits: the longer names first.
        names = sorted(rows, key=len, reverse=True)
        knobs["module_weights"] = {name: list(rows[name]) for name in names}
    return [labels[place] for place in used], knobs


def _achieved(
    opened: _Opened, kinds: tuple[SearchRows, SearchRows], settings: SearchSettings, target: Path
) -> Achieved:
    """What the adapter that was written costs on the same rows."""
    update = whole_updates(adapter_of(target).factors, opened.live)
    names = list(opened.live)
    merged = MergedModel(opened.model, [update], names, settings.kind, *kinds, settings.share, settings.batch_size)
    alone = torch.tensor([[0.0, 1.0]] * len(names), dtype=torch.float64)
    return Achieved(*merged.losses(alone))


def _peak_bytes(model: Any) -> int | None:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return None
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _write_untouched(task: Adapter, target: Path) -> None:
    """The fine-tuned adapter's own files, byte for byte."""
    assert task.folder is not None, "an adapter that was read has a folder"
    with new_folder(target) as folder:
        folder.mkdir(parents=True)
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(task.folder / name, folder / name)
        copy_tokenizer(task.folder, folder)
