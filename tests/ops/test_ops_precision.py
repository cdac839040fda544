import pytest
import torch

from safemerge_callback.ops import full_precision


@pytest.fixture(autouse=True)
def _restored():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
def test_full_within_and_as_before_afterwards(chosen):
    torch.set_float32_matmul_precision(chosen)
    with full_precision():
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    # the older way of asking raises where the two ways were left at odds
    assert torch.get_float32_matmul_precision() == chosen


def test_given_back_after_an_error():
    torch.set_float32_matmul_precision("high")
    with pytest.raises(ValueError, match="inside"), full_precision():
        raise ValueError("inside")
    assert torch.get_float32_matmul_precision() == "high"
