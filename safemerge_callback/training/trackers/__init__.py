"""Send a run's numbers to whatever the trainer already reports to, and to nothing else.

`protocol` says what a tracker is; one file each for W&B, TensorBoard, MLflow and trackio, none of which is imported
before `report_to` names it; `trackers` sends to all and catches what fails; `columns` and `picture` are the heat map.
"""

from .columns import COLUMNS, Row
from .protocol import Report, Run, Tracker, decision_rows, finite
from .trackers import TRACKERS, Trackers, known

__all__ = ["COLUMNS", "TRACKERS", "Report", "Row", "Run", "Tracker", "Trackers", "decision_rows", "finite", "known"]
