"""One Bad Model's two steps on LoRA: write safety and domain rows, then merge with the coefficients they choose.

    python -m recipes.one_bad_model FINETUNED [SAFETY ...] --subspace S --questions train.jsonl -o MERGED

Step 1. Safety rows: the aligned model, which is the same model with its adapter off, answers harmful and harmless
prompts; refusals of the former and answers to the latter are kept. Domain rows: the questions with the responses that
they have; where one has none the fine-tuned model writes it, and it is kept where it is an answer, coherent and no
refusal. Both lie in MERGED.rows, to be read before they are trusted.
Step 2. `safemerge search` with objective cross_entropy on these rows.

Source: One Bad Model Spoils the Bunch, arXiv:2406.14563, sections 3.1 and 3.2. Differs: the paper has an uncensored
model write the unsafe questions, which here are a prompt set; its released code has the unsafe expert answer both sets
of questions and filters neither, where this follows the paper.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from recipes.command import run_command
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.harvest import Harvest, harvest
from safemerge_callback.evaluation.judges import KeywordJudge, load_judge
from safemerge_callback.evaluation.loading import Subject, load_subject
from safemerge_callback.evaluation.prompts import PACKAGED, load_prompt_sets
from safemerge_callback.evaluation.questions import load_questions
from safemerge_callback.evaluation.rows import rows_text
from safemerge_callback.evaluation.verdicts import judged
from safemerge_callback.io.whole_file import whole_file
from safemerge_callback.offline.output import free_output
from safemerge_callback.offline.parts import adapters_of, subspace_of
from safemerge_callback.offline.search import Opening, search_merge
from safemerge_callback.signals.adapter_off import adapter_off
from safemerge_callback.signals.coefficients import SearchSettings
from safemerge_callback.signals.responses import respond
from safemerge_callback.signals.rows import RowFormat, SafetyRow, prompt_tokens

SAFETY_FILE, DOMAIN_FILE = "safety.jsonl", "domain.jsonl"


class Rows(NamedTuple):
    """The files of both kinds of rows, and in words what came of them."""

    safety: Path
    domain: Path
    words: str


def domain_rows(subject: Subject, questions: Sequence[SafetyRow], max_new_tokens: int) -> list[SafetyRow]:
    """Return the questions with their responses; those without are answered by the model as it is, and checked.

    A written response is kept where it is coherent and keywords see no refusal in it: a domain expert's answer.
    """
    bare = [row for row in questions if not row.response]
    tokens = [prompt_tokens(subject.tokenizer, [row.prompt], RowFormat(row.system))[0] for row in bare]
    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "label": "domain rows"}
    responses = [one.text for one in respond(subject.model, subject.tokenizer, tokens, **sizes)] if bare else []
    verdicts = judged(KeywordJudge(), [row.prompt for row in bare], responses)
    answers = iter(zip(responses, verdicts, strict=True))
    rows = []
    for row in questions:
        response, verdict = (row.response, "complied") if row.response else next(answers)
        if verdict == "complied":
            rows.append(replace(row, response=response))
    return rows


def write_rows(
    subject: Subject,
    questions: Sequence[SafetyRow],
    folder: Path,
    *,
    prompts: Sequence[str] = PACKAGED,
    num_prompts: int | None = None,
    judge: Any = "keywords",
    max_new_tokens: int = 64,
    seed: int = 0,
) -> Rows:
    """Write both kinds of rows in `folder`. Raises ConfigError as `harvest`, and where no domain row is left."""
    with adapter_off(subject.model):
        safety: Harvest = harvest(
            subject.model,
            subject.tokenizer,
            load_prompt_sets(list(prompts), num_prompts, seed),
            max_new_tokens=max_new_tokens,
            judge=judge,
            label="safety rows",
        )
    domain = domain_rows(subject, questions, max_new_tokens)
    if not domain:
        raise ConfigError(
            f"of {len(questions)} questions none got an answer that is coherent and no refusal: give questions with "
            "responses, or a fine-tuned model that answers them"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in ((SAFETY_FILE, safety.rows), (DOMAIN_FILE, domain)):
        with whole_file(folder / name) as place:
            place.write_text(rows_text(rows), encoding="utf-8")
    words = f"safety rows: {safety}; domain rows: {len(domain)} of {len(questions)} questions"
    return Rows(folder / SAFETY_FILE, folder / DOMAIN_FILE, words)


def main(args: Sequence[str] | None = None) -> None:
    """Both steps as the command line says."""
    options = _options(args)
    settings = SearchSettings("cross_entropy", options.granularity, options.minimiser, options.share, seed=options.seed)
    # All that the search would refuse is refused before anything is written for it.
    _check(options)
    questions = load_questions(options.questions, "questions", "benign")[: options.num_questions]
    judge = load_judge(options.judge)
    where: dict[str, Any] = {"base": options.base, "dtype": options.dtype, "device": options.device}
    subject = load_subject(options.finetuned, **where)
    if subject.adapter is None:
        raise ConfigError(f"{options.finetuned!r} is no adapter: give the fine-tuned LoRA, whose base is aligned")
    adapters_of(options.safety)
    subspace_of(options.subspace)
    rows = write_rows(
        subject,
        questions,
        Path(f"{options.output.rstrip('/')}.rows"),
        prompts=options.prompts,
        num_prompts=options.num_prompts,
        judge=judge,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )
    print(f"{rows.words}\n{rows.safety.parent}: written")
    # The search loads the model itself.
    del subject
    gc.collect()
    report = search_merge(
        options.finetuned,
        options.safety,
        options.subspace,
        options.output,
        task_rows=str(rows.domain),
        safety_rows=str(rows.safety),
        settings=settings,
        rows=options.rows,
        opening=Opening(options.base, options.dtype, options.device),
        overwrite=options.overwrite,
        progress=True,
    )
    print(f"{report}\n{options.output}: written")


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError for a number of things that is none, and for an output that would not be written."""
    for name in ("num_prompts", "num_questions", "max_new_tokens", "rows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: give 1 or more")
    inputs = [options.finetuned, *options.safety, options.subspace, options.questions]
    free_output(options.output, inputs, options.overwrite)


def _options(args: Sequence[str] | None) -> argparse.Namespace:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("finetuned", metavar="FINETUNED", help="the fine-tuned LoRA adapter: folder or Hub id")
    words.add_argument("safety", metavar="SAFETY", nargs="*", help="safety adapters; none: pull to the aligned model")
    words.add_argument("--subspace", required=True, help="the subspace file")
    words.add_argument("--questions", required=True, help="rows of the domain, with or without responses")
    words.add_argument("-o", "--output", required=True, help="folder of the merged adapter; rows lie in OUTPUT.rows")
    words.add_argument("--prompts", nargs="+", default=list(PACKAGED), help="sets, harm:FILE, benign:FILE")
    words.add_argument("--num-prompts", type=int, help="of each set at most; left out: all")
    words.add_argument("--num-questions", type=int, default=2000, help="of the questions at most, from the first")
    words.add_argument("--judge", default="keywords", help="who says what is a refusal: keywords, llamaguard, ...")
    words.add_argument("--max-new-tokens", type=int, default=64, help="of a response that is written")
    words.add_argument("--rows", type=int, default=64, help="rows of each kind that the search reads")
    words.add_argument("--granularity", default="run", help="run, block or module")
    words.add_argument("--minimiser", help="golden, gradient, cma (the paper's) or tezo")
    words.add_argument("--share", type=float, default=1.0, help="what a safety row counts against a domain row")
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--base", help="the adapter's base model; left out: what its config names")
    words.add_argument("--dtype", default="auto")
    words.add_argument("--device")
    words.add_argument("--overwrite", action="store_true", help="replace a merge that is there")
    return words.parse_args(args)


if __name__ == "__main__":
    run_command(main)
