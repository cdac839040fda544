"""trackio: the local dashboard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import trackio

from ...errors import TrackerError
from .columns import Drift
from .picture import heat_map
from .protocol import Report, Run

AXIS = "train/global_step"


class TrackioTracker:
    """Log to the live trackio run. The trainer ends it before our last hook, whose merge the journal alone tells.

    Artifacts are kept apart from what a run logs, so the ended run still takes one.
    """

    # Releases before 0.30 have none.
    takes_files: ClassVar[bool] = hasattr(trackio, "Artifact")

    def __init__(self, run: Run) -> None:
        self.run = trackio.context_vars.current_run.get()
        if run.settings:
            trackio_run().config["safemerge"] = dict(run.settings)

    def check(self, report: Report) -> None:
        """Log the numbers on the trainer's axis, and how the cosines are spread."""
        cosines = [row.cosine for row in report.rows if row.cosine is not None]
        spread = {"safemerge/cosines": trackio.Histogram(cosines)} if cosines else {}
        self._log(report.step, {**report.metrics, **spread})

    def numbers(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log scalars on the trainer's axis."""
        self._log(step, metrics)

    def heat_map(self, step: int, drift: Drift) -> None:
        """Log the picture of all checks so far; nothing once the run was ended, which the numbers tell of."""
        if trackio.context_vars.current_run.get() is not None:
            self._log(step, {"safemerge/heat_map": trackio.Image(heat_map(drift))})

    def alert(self, step: int, title: str, text: str) -> None:
        """Send a trackio alert: to the terminal, the dashboard, and the webhook that the user has set."""
        trackio_run().alert(title=title, text=text)

    def files(self, step: int, folder: Path) -> None:
        """Log the folder as the artifact `safemerge-<run id>` of the run that was live when training began."""
        run = self.run if self.run is not None else trackio_run()
        artifact = trackio.Artifact(f"safemerge-{run.id}", type="safemerge", metadata={"safemerge/step": step})
        artifact.add_dir(folder)
        run.log_artifact(artifact)

    def close(self) -> None:
        """Leave the run to whoever started it."""

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        trackio_run().log({AXIS: step, **values})


def trackio_run() -> Any:
    """Return the live run; TrackerError where there is none."""
    run = trackio.context_vars.current_run.get()
    if run is None:
        raise TrackerError("no trackio run is live: it was ended, or the trainer does not report to trackio")
    return run
