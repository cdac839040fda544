"""The quicker dtype is measured, where and as models run, and never guessed from a list of instructions."""

import time

import pytest
import torch

from recipes import processor
from recipes.processor import ProcessorPace, measured_pace, processor_name


@pytest.fixture
def fresh():
    measured_pace.cache_clear()
    yield
    measured_pace.cache_clear()


def test_it_is_measured_once_and_says_on_what(fresh):
    pace = measured_pace()
    assert pace.float32 > 0
    assert pace.bfloat16 > 0
    assert pace.processor == processor_name()
    assert f"{pace.ratio:.2g} times" in str(pace)
    assert measured_pace() is pace


@pytest.mark.parametrize("slower", ["bfloat16", "float32"])
def test_the_one_that_takes_longer_is_not_taken(fresh, monkeypatch, slower):
    """Whatever the processor lists: here the products themselves wait."""
    linear = torch.nn.functional.linear

    def waits(x, weight):
        if str(x.dtype) == f"torch.{slower}":
            time.sleep(0.02)
        return linear(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", waits)
    monkeypatch.setattr(processor, "SHAPES", ((8, 8, 8),))
    assert measured_pace().dtype != slower


def test_a_device_without_bfloat16_takes_float32(fresh, monkeypatch):
    products = processor._products
    monkeypatch.setattr(
        processor, "_products", lambda dtype, device: products(dtype, device) if dtype == torch.float32 else None
    )
    assert (measured_pace().bfloat16, measured_pace().dtype) == (0.0, "float32")


@pytest.mark.parametrize(("quicker", "dtype"), [(3.0, "bfloat16"), (1.1, "float32"), (0.6, "float32")])
def test_a_little_quicker_is_not_worth_the_rounding(quicker, dtype):
    assert ProcessorPace("a processor", 100.0, 100.0 * quicker).dtype == dtype
