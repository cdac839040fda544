import io
import sys

import pytest
import rich.console

from safemerge_callback.subspace.bar import byte_bar
from tests.support.terminal import Terminal


@pytest.mark.parametrize("width", [80, 60, 200])
@pytest.mark.parametrize("name", ["q", "model.language_model.layers.10.mlp.experts.127.gate_[red]up_proj"])
def test_a_bar_stays_on_one_line_of_the_terminal(monkeypatch, width, name):
    text, console = io.StringIO(), rich.console.Console
    terminal = lambda **_: console(file=text, width=width, force_terminal=True, color_system=None)  # noqa: E731
    monkeypatch.setattr(rich.console, "Console", terminal)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with byte_bar("compressing subspace", 301_600_000_000, 0, shown=True, note="31 of 224 modules kept") as advance:
        advance(name, 196_600_000_000)
    lines = [line for part in text.getvalue().split("\r") for line in part.split("\n")]
    plain = [
        line.replace("\x1b[?25l", "").replace("\x1b[?25h", "").replace("\x1b[2K", "").replace("\x1b[1A", "")
        for line in lines
    ]
    assert any("GB" in line for line in plain)
    assert max(map(len, plain)) <= width
    if width >= 80:
        # all that is left of a frame is one line, and it says which module
        assert any(line.rstrip().endswith(name[-17:]) and "196.6/301.6 GB" in line for line in plain), plain
