"""Weights & Biases: the only file of the package that imports wandb."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, get_args, get_type_hints

import wandb

from ...decision import BAND
from ...errors import TrackerError
from ...record.metrics import KEYS
from .columns import ColumnCell, Drift, Row
from .protocol import Report, Run

AXIS = "train/global_step"
CHART = "safemerge_heat_map"
# Fields of the chart's specification -> columns of the table that it is drawn from.
FIELDS = {name: name for name in ColumnCell._fields}


class WandbTracker:
    """Log to the live W&B run, on the trainer's own axis; the trainer, or the user, starts and ends that run."""

    takes_files: ClassVar[bool] = True

    def __init__(self, run: Run) -> None:
        self.settings = run.settings
        self.attached: Any = None
        self.decisions: Any = None
        self.attach()

    def attach(self) -> Any:
        """Return the live run; the first time, define the axis and the summaries, and show the settings.

        Raises TrackerError where there is none.
        """
        run = wandb.run
        if run is None:
            raise TrackerError(
                "the W&B run was ended before the training was: end it afterwards"
                if self.attached
                else "no W&B run is live: log in with `wandb login`, or set WANDB_MODE=offline"
            )
        if run is not self.attached:
            self.attached = run
            self.decisions = _table(Row, log_mode="INCREMENTAL")
            run.define_metric("safemerge/*", step_metric=AXIS)
            for key, metric in KEYS.items():
                # The last value is what W&B keeps by itself.
                if metric.summary != "last":
                    run.define_metric(key, step_metric=AXIS, summary=metric.summary)
            if self.settings:
                run.config.update({"safemerge": dict(self.settings)}, allow_val_change=True)
        return run

    def check(self, report: Report) -> None:
        """Log the numbers, and the decisions as the next rows of one table."""
        run = self.attach()
        for row in report.rows:
            self.decisions.add_data(*row)
        table = {"safemerge/decisions": self.decisions} if report.rows else {}
        # `step=` would fight with the trainer's own logging: W&B drops what comes with an older step.
        run.log({AXIS: report.step, **report.metrics, **table})

    def numbers(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log scalars on the trainer's axis."""
        self.attach().log({AXIS: step, **metrics})

    def heat_map(self, step: int, drift: Drift) -> None:
        """Log every module at every check so far as one table, shown by the saved chart where the settings name it."""
        run = self.attach()
        table = _table(ColumnCell)
        for cell in drift.cells:
            table.add_data(*cell)
        chart = self.settings.get("wandb_chart")
        # What a chart logs is its table, under this key; so with and without one the table is in the same place.
        shown = {"safemerge/heat_map": wandb.plot_table(chart, table, FIELDS)} if chart else {}
        run.log({AXIS: step, **(shown or {"safemerge/heat_map_table": table})})

    def alert(self, step: int, title: str, text: str) -> None:
        """Send a W&B alert, which reaches people as they have chosen there."""
        self.attach().alert(title, text, level="WARN")

    def files(self, step: int, folder: Path) -> None:
        """Log the folder as the artifact `safemerge-<run id>`; with WANDB_LOG_MODEL=false without the adapter."""
        run = self.attach()
        bare = os.environ.get("WANDB_LOG_MODEL", "").lower() == "false"
        artifact = wandb.Artifact(f"safemerge-{run.id}", type="safemerge", metadata={"safemerge/step": step})
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            if not (bare and path.name.startswith("adapter_")):
                artifact.add_file(str(path), name=path.relative_to(folder).as_posix())
        run.log_artifact(artifact)

    def adapter(self, model: Any, run_name: str | None, step: int) -> None:
        """Log `model`'s adapter as the next version of the trainer's own artifact, named after the run's name or id."""
        run = self.attach()
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            artifact = wandb.Artifact(
                f"model-{run.name if run_name else run.id}", type="model", metadata={"safemerge/step": step}
            )
            artifact.add_dir(folder)
            run.log_artifact(artifact, aliases=["final_model", "safemerge"])

    def close(self) -> None:
        """Leave the run to whoever started it."""


def _table(row: type[Row] | type[ColumnCell], **how: Any) -> Any:
    """An empty table of such rows; the types are told, since W&B takes half as long again to find them out."""
    hints = [get_args(hint) or (hint,) for hint in get_type_hints(row).values()]
    kinds, optional = [hint[0] for hint in hints], [type(None) in hint for hint in hints]
    return wandb.Table(columns=list(row._fields), dtype=kinds, optional=optional, **how)


def chart_spec() -> dict[str, Any]:
    """Return the Vega-Lite specification of the heat map; `${field:...}` are columns of `safemerge/heat_map_table`."""
    spec: dict[str, Any] = json.loads(files(__package__).joinpath("heat_map.vega.json").read_text(encoding="utf-8"))
    spec["params"] = [{"name": "edge", "value": BAND.edge}]
    return spec


def save_chart(entity: str, access: str = "private") -> str:
    """Save the heat map as a chart of a W&B user or team; return `entity/name`, which setting `wandb_chart` takes.

    Needs a login, and is done once. Raises wandb.Error where W&B refuses.
    """
    wandb.Api().create_custom_chart(
        entity=entity,
        name=CHART,
        display_name="Safety drift by layer and module type",
        spec_type="vega2",
        access="public" if access == "public" else "private",
        spec=chart_spec(),
    )
    return f"{entity}/{CHART}"
