"""Progress is drawn on a terminal, and not where who calls wants quiet."""

import io
import sys

from safemerge_callback.io.bars import bars_shown, without_bars
from safemerge_callback.signals.responses import under_bar
from tests.support.terminal import Terminal


def test_only_on_a_terminal_or_in_a_notebook_and_not_in_quiet(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert bars_shown()
    with without_bars():
        assert not bars_shown()
        with without_bars(False):
            assert not bars_shown()
    with without_bars(False):
        assert bars_shown()
    notebooks = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    monkeypatch.setattr(sys, "stderr", notebooks())
    assert bars_shown()
    for no_terminal in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", no_terminal)
        assert not bars_shown()


def test_a_bar_over_items_keeps_to_it(monkeypatch):
    for stream, quiet, drawn in ((Terminal(), False, True), (Terminal(), True, False), (io.StringIO(), False, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with without_bars(quiet):
            assert list(under_bar(range(3), "rows")) == [0, 1, 2]
        assert ("rows" in stream.getvalue()) == drawn
