"""The verb that puts two evaluations, or two runs, beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import Verb, app, examples, or_error, show

if TYPE_CHECKING:
    from ..evaluation.figures_file import Evaluation


@app.command(
    cls=Verb,
    epilog=examples(
        "compare plain.json guarded.json",
        "compare RUN_WITHOUT RUN_WITH --json",
        'compare base.json adapter.json --markdown >> "$GITHUB_STEP_SUMMARY"',
    ),
)
def compare(
    first: Annotated[
        Path, typer.Argument(metavar="FIRST", help="What `eval -o`, `gate --json` or `--evidence` wrote; or a run.")
    ],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="The same of what it is compared with.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
) -> None:
    """Did it help? What the second refuses, over-refuses and scores more or less than the first, with intervals.

    Exits with 0 whatever the answer, 2 wrong usage, 3 a source that cannot be read, 4 nothing was measured of both.
    """
    one, other = or_error(lambda: (_evaluation(first), _evaluation(second)))
    from ..evaluation.comparison import compare as compared
    from ..evaluation.comparison import comparison_document
    from ..reports.comparison import comparison_markdown, comparison_text

    comparison = compared(one, other)
    form = comparison_markdown if markdown else comparison_text
    names = (one.name, other.name)
    show(form(comparison, *names), comparison_document(comparison, *names))
    if comparison.exit_code:
        raise typer.Exit(comparison.exit_code)


def _evaluation(source: Path) -> Evaluation:
    """A file of figures, or what a run was last measured at."""
    from ..evaluation.figures_file import Evaluation, read_evaluation
    from ..record.run_evaluation import run_evaluations

    if source.is_dir() or source.suffix == ".jsonl":
        return run_evaluations(source).last or Evaluation(str(source), [])
    return read_evaluation(source)
