"""What processes tell each other."""

import pytest
import torch
import torch.distributed as dist

from safemerge_callback.errors import AdapterError, PlanError, SafeMergeError
from safemerge_callback.live.ranks import (
    ProcessesError,
    agree,
    all_or_none,
    copy_from_first,
    everyones,
    from_first,
    many,
)
from tests.support.ranks import run_on


def raising(error):
    raise error


def test_one_process_agrees_with_itself_and_raises_its_own_error():
    agree("the decisions", "abc")
    tensor = torch.ones(2)
    copy_from_first([tensor])
    assert (many(), from_first(3), everyones("x"), all_or_none(lambda: 7)) == (False, 3, ["x"], 7)
    error = KeyError("lost")
    with pytest.raises(KeyError) as caught:
        all_or_none(lambda: raising(error))
    assert caught.value is error


def check_values():
    rank = dist.get_rank()
    assert many()
    assert everyones(f"r{rank}") == ["r0", "r1"]
    assert from_first({"rank": rank}) == {"rank": 0}
    whole, part = torch.full((3,), float(rank)), torch.full((4, 4), float(rank))
    copy_from_first([whole, part.T[1:3]])
    assert torch.equal(whole, torch.zeros(3))
    assert torch.equal(part[:, 1:3], torch.zeros(4, 2))
    assert torch.equal(part[:, 3], torch.full((4,), float(rank)))


def check_disagreement():
    rank = dist.get_rank()
    agree("the factors", "same")
    with pytest.raises(
        ProcessesError, match=r"the factors must be the same .* 2 ranks.*'f0' on rank 0; 'f1' on rank 1"
    ):
        agree("the factors", f"f{rank}")
    assert issubclass(ProcessesError, SafeMergeError)


def check_errors():
    rank = dist.get_rank()
    assert all_or_none(lambda: rank) == rank
    with pytest.raises(PlanError, match=r"^no such module \(on rank 1 of 2\)$") as caught:
        all_or_none(lambda: raising(PlanError("no such module")) if rank else None)
    assert (caught.value.__cause__ is None) == (rank == 0)
    with pytest.raises(AdapterError, match=r"^ZeroDivisionError: .*\(on rank 0, 1 of 2\)$"):
        all_or_none(lambda: 1 / 0)
    with pytest.raises(AdapterError, match="on rank 0 of 2"):
        all_or_none(lambda: raising(AdapterError("gone")) if rank == 0 else None)


def check_all():
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    check_values()
    check_disagreement()
    check_errors()


def test_two_processes_raise_alike():
    run_on(2, check_all)
