"""Within, torch computes what is written down; what is borrowed goes back."""

import threading
import warnings

import pytest
import torch

from safemerge_callback.ops import full_precision, reduced_products
from safemerge_callback.ops.precision import _AUTOCAST_DEVICES


@pytest.fixture(autouse=True)
def _restored():
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"
    for device in _AUTOCAST_DEVICES:
        torch.set_autocast_enabled(device, False)


def kinds():
    return [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
def test_products_are_whole_within_and_as_before_afterwards(chosen):
    torch.set_float32_matmul_precision(chosen)
    assert reduced_products() == (chosen != "highest")
    with full_precision():
        assert not reduced_products()
        assert not {*kinds()} - {"ieee", "none"}
    # the older way of asking raises where the two ways were left at odds
    assert torch.get_float32_matmul_precision() == chosen


def test_what_only_follows_the_general_setting_goes_on_to_follow_it():
    torch.backends.fp32_precision = "tf32"
    assert reduced_products()
    with full_precision():
        assert kinds() == ["ieee", "ieee"]
    assert kinds() == ["tf32", "tf32"]
    torch.backends.fp32_precision = "ieee"
    assert kinds() == ["ieee", "ieee"]


def test_where_nothing_is_reduced_no_setting_is_touched():
    """A check may run beside the training: the setting is the process's."""
    before = kinds()
    with full_precision():
        assert kinds() == before


def test_given_back_after_an_error():
    @full_precision()
    def fails():
        assert torch.empty(1).device.type == "cpu"
        raise ValueError("inside")

    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        with pytest.raises(ValueError, match="inside"):
            fails()
        assert torch.is_autocast_enabled("cpu")
        assert torch.empty(1).device.type == "meta"
    assert torch.get_float32_matmul_precision() == "high"


def every_device():
    """All that torch knows: it lists them where it is asked for one that is not there."""
    with pytest.raises(RuntimeError) as told:
        torch.device("nowhere")
    return str(told.value).partition("one of ")[2].partition(" device type")[0].split(", ")


def test_autocast_is_off_on_every_device_that_has_one():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no longer used as device type")
        able = {name for name in every_device() if torch.amp.is_autocast_available(name)}
    assert {"cpu", "cuda"} < able <= {*_AUTOCAST_DEVICES}
    for device in able:
        torch.set_autocast_enabled(device, True)
    with full_precision():
        assert not any(torch.is_autocast_enabled(device) for device in able)
        assert not torch.is_autocast_enabled()
    assert all(torch.is_autocast_enabled(device) for device in able)


def test_autocast_on_another_thread_is_off_there_too():
    x = torch.randn(64, 64)
    seen = []

    def work():
        with torch.autocast("cpu", dtype=torch.bfloat16), full_precision():
            seen.append(x @ x)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(seen[0], x @ x)


def test_the_dtype_of_an_outer_autocast_is_given_back():
    with torch.autocast("cpu", dtype=torch.float16):
        with full_precision():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.get_autocast_dtype("cpu") == torch.float16
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16


@pytest.mark.parametrize("how", ["context", "set"])
def test_what_names_no_device_is_on_the_cpu(how):
    if how == "set":
        torch.set_default_device("meta")
    try:
        with torch.device("meta"):
            with full_precision():
                assert torch.zeros(2).tolist() == [0.0, 0.0]
                assert torch.Generator().device.type == "cpu"
            assert torch.zeros(2).device.type == "meta"
    finally:
        torch.set_default_device(None)


def test_nothing_is_recorded_and_nothing_is_an_inference_tensor():
    weight = torch.ones(2, 2, requires_grad=True)

    @full_precision()
    def double(x):
        return 2 * x

    with torch.enable_grad():
        assert not double(weight).requires_grad
        assert torch.is_grad_enabled()
    with torch.inference_mode():
        made = double(weight)
        assert torch.is_inference_mode_enabled()
    assert not made.is_inference()
    made.requires_grad_(True).square().sum().backward()
