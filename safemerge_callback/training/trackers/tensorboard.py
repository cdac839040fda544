"""TensorBoard: an event file of our own beside the trainer's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from torch.utils.tensorboard import SummaryWriter

from ...errors import TrackerError
from ...io.paths import as_path
from .columns import Drift
from .picture import heat_map
from .protocol import Report, Run


class TensorBoardTracker:
    """Write scalars, the histogram of the cosines and the heat map to the folder `safemerge` beneath the trainer's run.

    Its own folder, because a reader may give up the older of two event files that grow in one.
    """

    takes_files: ClassVar[bool] = False

    def __init__(self, run: Run) -> None:
        self.writer = SummaryWriter(log_dir=str(_run_folder(run.folder) / "safemerge"))
        if run.settings:
            words = json.dumps(dict(run.settings), indent=1, default=str)
            self.writer.add_text("safemerge/config", "\n".join(f"    {line}" for line in words.splitlines()), 0)

    def check(self, report: Report) -> None:
        """Write the numbers, and how the cosines are spread."""
        import numpy as np

        cosines = [row.cosine for row in report.rows if row.cosine is not None]
        if cosines:
            self.writer.add_histogram("safemerge/cosines", np.asarray(cosines), report.step)
        self.numbers(report.step, report.metrics)

    def numbers(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write scalars, and wait until they are in the file."""
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def heat_map(self, step: int, drift: Drift) -> None:
        """Write the picture of all checks so far."""
        import numpy as np

        self.writer.add_image("safemerge/heat_map", np.asarray(heat_map(drift)), step, dataformats="HWC")
        self.writer.flush()

    def alert(self, step: int, title: str, text: str) -> None:
        """Write it as a text: TensorBoard calls nobody."""
        self.writer.add_text("safemerge/alert", f"{title}: {text}", step)
        self.writer.flush()

    def files(self, step: int, folder: Path) -> None:
        """Nothing: TensorBoard keeps no files."""

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


def _run_folder(output_dir: Path) -> Path:
    """The folder of the trainer's own event file, known by the process id in its name."""
    chosen = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if chosen:
        return as_path(chosen, "TENSORBOARD_LOGGING_DIR", error=TrackerError)
    runs = output_dir / "runs"
    ours = [p for p in runs.rglob(f"events.out.tfevents.*.{os.getpid()}.*") if p.parent.name != "safemerge"]
    return max(ours, key=lambda p: p.stat().st_mtime).parent if ours else runs
