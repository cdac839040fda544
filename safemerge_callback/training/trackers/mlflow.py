"""MLflow: metrics, and artifacts under `safemerge/`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import mlflow
from mlflow.entities import Metric

from ...errors import TrackerError
from .columns import Drift
from .picture import heat_map
from .protocol import Report, Run


class MlflowTracker:
    """Log to the MLflow run that is active when training begins.

    By its id, because the trainer ends that run before our last hook; what comes later still lands in it.
    """

    takes_files: ClassVar[bool] = True

    def __init__(self, run: Run) -> None:
        active = mlflow.active_run()
        if active is None:
            raise TrackerError("no MLflow run is active: start one, or let the trainer do it (report_to='mlflow')")
        self.client, self.run_id = mlflow.MlflowClient(), active.info.run_id
        self.sent: Any = None
        if run.settings:
            self.client.log_dict(self.run_id, dict(run.settings), "safemerge/config.json")

    def check(self, report: Report) -> None:
        """Log the numbers under the optimizer step."""
        self.numbers(report.step, report.metrics)

    def numbers(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log scalars without waiting; what became of the last ones is found out here, and raised."""
        self._settle(wait=False)
        now = int(time.time() * 1000)
        batch = [Metric(key, value, now, step) for key, value in metrics.items()]
        self.sent = self.client.log_batch(self.run_id, metrics=batch, synchronous=False)

    def heat_map(self, step: int, drift: Drift) -> None:
        """Keep the picture of all checks so far as the artifact safemerge/heat_map.png, in place of the last one."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "heat_map.png"
            heat_map(drift).save(path)
            self.client.log_artifact(self.run_id, str(path), "safemerge")

    def alert(self, step: int, title: str, text: str) -> None:
        """Set the tag safemerge.alert: MLflow calls nobody."""
        self.client.set_tag(self.run_id, "safemerge.alert", f"{title}: {text}")

    def files(self, step: int, folder: Path) -> None:
        """Keep the folder as the run's artifacts under safemerge/."""
        self.client.log_artifacts(self.run_id, str(folder), "safemerge")

    def close(self) -> None:
        """Wait for what is still on its way."""
        self._settle(wait=True)

    def _settle(self, *, wait: bool) -> None:
        sent = self.sent
        if sent is not None and (wait or all(f.done() for f in sent._operation_futures)):
            self.sent = None
            sent.wait()
