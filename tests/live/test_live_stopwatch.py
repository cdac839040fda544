"""Seconds of laps, and of nothing in between."""

import time

import pytest
import torch

from safemerge_callback.live.stopwatch import Stopwatch


def test_laps_add_up():
    watch = Stopwatch(torch.device("cpu"))
    assert watch.seconds == 0
    with watch.lap():
        time.sleep(0.02)
    time.sleep(0.05)
    first = watch.seconds
    with watch.lap():
        time.sleep(0.01)
    assert 0.02 <= first < 0.05
    assert watch.seconds - first >= 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_device_is_timed_behind_the_hosts_back():
    watch, x = Stopwatch(torch.device("cuda", 0)), torch.randn(4096, 4096, device="cuda")
    with watch.lap():
        for _ in range(20):
            x = x @ x / 64
    assert watch.seconds > 0
