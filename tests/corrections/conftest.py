"""The same runs as tests/training, loaded from there by path."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("training_runs", Path(__file__).parents[1] / "training" / "conftest.py")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

runs = _module.runs
world = _module.world
