"""What `safemerge gate` decides on: figures in a file, a run's probe, or a model that is asked here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigError
from .app import note
from .evaluation import installed_versions, ready
from .options import names_listed

if TYPE_CHECKING:
    from ..evaluation import Share


class Source(NamedTuple):
    """What is decided on: its name and figures, and those of the base, None where it was not measured.

    `record`: of a model that was asked, what was asked and how, as JSON has it.
    """

    name: str
    figures: Sequence[Share]
    base_name: str | None = None
    base: Sequence[Share] | None = None
    record: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a model is asked, and what is done to it first: the verb's options of these names."""

    probes: str
    judge: list[str] | None
    n: int
    seed: int
    max_new_tokens: int
    batch_size: int
    after_merge: bool
    after_quantize: str | None
    evidence: bool

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Asking:
        """Return what is among the verb's options."""
        return cls(**{one.name: options[one.name] for one in fields(cls)})

    @property
    def judges(self) -> list[str]:
        """The names of who judges."""
        return self.judge or ["keywords"]

    @property
    def sizes(self) -> dict[str, Any]:
        """The tokens of a response, and the prompts of a batch."""
        return {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}

    @property
    def settings(self) -> dict[str, Any]:
        """What is written of it."""
        changed = {"after_merge": self.after_merge, "after_quantize": self.after_quantize}
        return {"n": self.n, "seed": self.seed, **self.sizes, **changed}

    def name_of(self, model: str) -> str:
        """Return what the model is called once that is done to it."""
        return ", ".join([model, *(["merged"] if self.after_merge else []), *filter(None, [self.after_quantize])])


def of_figures(path: Path) -> Source:
    """Return what `safemerge eval -o` wrote."""
    from ..evaluation.figures_file import read_figures

    return Source(str(path), read_figures(path))


def of_run(run: Path) -> Source:
    """Return a run's last probe, and before it the one that began it."""
    from ..record.run_evaluation import run_evaluations

    first, last = run_evaluations(run)
    if last is None:
        return Source(str(run), [])
    return Source(last.name, last.figures, first and first.name, first and first.figures)


def with_baseline(source: Source, baseline: Path | None) -> Source:
    """Return the source with the base that a file has of it, if one is given."""
    from ..evaluation.figures_file import read_figures

    return source if baseline is None else source._replace(base_name=str(baseline), base=read_figures(baseline))


def of_model(model: str, asking: Asking, loading: Mapping[str, Any], with_base: bool) -> Source:
    """Return a model's answers and, with `with_base`, an adapter's base's: the same model with the adapter off."""
    from ..evaluation.figures import figures, with_refusals
    from ..evaluation.figures_file import question_keys
    from ..evaluation.loading import load_subject
    from ..record.evidence import adapter_evidence, base_evidence
    from ..signals.adapter_off import adapter_off

    prompts = names_listed(asking.probes)
    sets, judges, _ = ready(prompts, asking.judges, [], None, asking.n, asking.seed, (None, None))
    # Of the adapter as it is before it is asked: what changes meanwhile is then seen.
    files = adapter_evidence(Path(model)) if asking.evidence else {}
    subject = load_subject(model, **loading)
    files |= base_evidence(Path(model), loading["base"]) if asking.evidence else {}
    if asking.after_merge and not subject.adapter:
        raise ConfigError(f"model {model!r} is no adapter, so there is nothing to add into a base: no --after-merge")
    failures: list[str] = []

    def answers(live: Any) -> list[Share]:
        return list(figures(live, subject.tokenizer, sets, judges, **asking.sizes, failures=failures))

    base = None
    if with_base and subject.adapter:
        with adapter_off(subject.model):
            base = answers(subject.model)
    shares = answers(_as_shipped(subject.model, asking))
    for failure in dict.fromkeys(failures):
        note(f"note: {failure}")
    questions = question_keys(subject.tokenizer, sets, with_refusals(judges))
    settings = {**asking.settings, "dtype": str(loading["dtype"])}
    record = {**files, "settings": settings, **questions, "versions": installed_versions()}
    return Source(asking.name_of(model), shares, subject.base if base else None, base, record)


def _as_shipped(model: Any, asking: Asking) -> Any:
    """The model that will be shipped. Asked last: neither can be taken back."""
    from ..evaluation.quantised import quantise

    shipped = model.merge_and_unload() if asking.after_merge else model
    if asking.after_quantize:
        quantise(shipped, asking.after_quantize)
    return shipped
