"""Floor 5: what a journal tells, as a table and as a picture."""

from .heatmap import draw_heat_map, write_heat_map
from .history import Cell, History, read_history
from .readings import readings_json, readings_text
from .table import summary

__all__ = [
    "Cell",
    "History",
    "draw_heat_map",
    "read_history",
    "readings_json",
    "readings_text",
    "summary",
    "write_heat_map",
]
