"""Floor 9: what a journal tells, as a table, as pictures, as a page and, while it grows, in the terminal."""

from ..record import PAGE_FILE
from ..record.entries import read_history
from ..record.history import Cell, Event, History, Measured, Probe
from .heatmap import draw_heat_map, write_heat_map
from .page import render_page, write_page
from .plots import PLOTS, draw_plot, write_report
from .table import readings_document, readings_text, summary, summary_document
from .watch import watch_run

__all__ = [
    "PAGE_FILE",
    "PLOTS",
    "Cell",
    "Event",
    "History",
    "Measured",
    "Probe",
    "draw_heat_map",
    "draw_plot",
    "read_history",
    "readings_document",
    "readings_text",
    "render_page",
    "summary",
    "summary_document",
    "watch_run",
    "write_heat_map",
    "write_page",
    "write_report",
]
