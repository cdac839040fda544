"""What `safemerge gate` leaves beside an adapter as evidence, and how it looks at it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .app import show

if TYPE_CHECKING:
    from ..evaluation.acceptance import Thresholds


def adapter_here(model: str | None) -> Path:
    """Return the folder of an adapter on this machine, where evidence lies; ConfigError for what is none."""
    from ..evaluation.loading import is_adapter
    from ..record.evidence import NAME

    # What was an adapter may have lost its config since: that is a change, and no wrong use.
    if model is None or not (Path(model, NAME).is_file() or (Path(model).is_dir() and is_adapter(model))):
        raise ConfigError(
            f"evidence lies beside an adapter that is on this machine, and {model!r} is no adapter's folder: give one, "
            "or leave --evidence and --verify out"
        )
    return Path(model)


def check_evidence(model: str) -> None:
    """Raise ConfigError where no evidence could be written beside a model, before it is asked."""
    from ..io.outputs import free_output
    from ..record.evidence import KIND, NAME

    free_output(adapter_here(model) / NAME, "evidence", KIND)


def look_again(adapter: Path, base: str | None, probes: Sequence[str] | None, limits: Thresholds | None) -> int:
    """Look whether all that an adapter's evidence names is as it was and passes, say so, and return the exit code.

    `limits`: other thresholds than those of the evidence.
    """
    from ..record.evidence import NAME, evidence_checks, read_evidence

    document = read_evidence(adapter)
    checks = list(evidence_checks(adapter, document, base, probes))
    changed = [one.what for one in checks if one.state == "changed"]
    lead = f"changed: {', '.join(changed)}" if changed else "nothing has changed"
    # Of a file that was edited nothing can be taken for what was measured.
    ruled, text = ({}, "") if NAME in changed else _decided(adapter, document, limits)
    failure = {"outcome": "failed", "exit_code": 1} if changed else {}
    known = {**ruled, **failure, "checks": [one._asdict() for one in checks]}
    show("\n".join([f"{adapter}: {lead}", *map(str, checks), text]).rstrip(), known)
    return int(known["exit_code"])


def _decided(adapter: Path, document: Mapping[str, Any], limits: Thresholds | None) -> tuple[dict[str, Any], str]:
    """What the figures of the evidence come to, as JSON and as text."""
    from ..evaluation.acceptance import Thresholds, decide, document_of
    from ..record.evidence import evidence_figures
    from ..reports.acceptance import decision_text

    figures, base = evidence_figures(document)
    thresholds = limits or Thresholds(**document["thresholds"])
    decision = decide(figures, thresholds, base)
    return document_of(decision, thresholds, str(adapter), document["base"]), decision_text(
        decision, document["source"]
    )
