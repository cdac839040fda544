import threading

import pytest
import torch
from safetensors.torch import save_file

from safemerge_callback.errors import SubspaceError
from safemerge_callback.subspace import read_ahead
from safemerge_callback.subspace.read_ahead import ReadAhead, spans_of, will_need


def test_the_next_is_read_when_told_and_no_more_than_that():
    begun = {name: threading.Event() for name in "abcd"}

    def read(name):
        begun[name].set()
        return name.upper()

    with ReadAhead("abcd", read) as ahead:
        assert ahead.take() == "A"
        assert not begun["b"].wait(0.05)
        ahead.start()
        ahead.start()
        assert begun["b"].wait(10)
        assert not begun["c"].wait(0.05)
        assert [ahead.take() for _ in range(3)] == ["B", "C", "D"]
        ahead.start()
        with pytest.raises(StopIteration):
            ahead.take()


def test_reading_is_done_in_another_thread_and_its_fault_comes_out_at_its_own_turn():
    threads = set()

    def read(name):
        threads.add(threading.current_thread())
        if name == "b":
            raise SubspaceError("shard gone")
        return name

    with ReadAhead("abc", read) as ahead:
        assert ahead.take() == "a"
        with pytest.raises(SubspaceError, match="shard gone"):
            ahead.take()
    assert threads.isdisjoint({threading.current_thread()})
    assert not any(thread.is_alive() for thread in threads)


def test_nothing_that_was_taken_is_kept():
    freed = threading.Event()

    class Weight:
        def __del__(self):
            freed.set()

    with ReadAhead(range(2), lambda number: Weight() if number == 0 else None) as ahead:
        assert isinstance(ahead.take(), Weight)
        assert freed.wait(10)


def test_a_span_holds_the_values_of_its_tensor(tmp_path):
    path = tmp_path / "file.safetensors"
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7).to(torch.int8), "nothing": torch.zeros(0, 4)}
    save_file(tensors, path, metadata={"format": "pt"})
    content, spans = path.read_bytes(), spans_of(path)
    assert {key: content[at : at + size] for key, (at, size) in spans.items()} == {
        key: tensor.numpy().tobytes() for key, tensor in tensors.items()
    }


def test_advice_on_a_file_that_is_gone_is_no_error_and_none_is_given_where_the_system_takes_none(tmp_path, monkeypatch):
    will_need(tmp_path / "gone", [(0, 10)])
    given = []
    monkeypatch.setattr(read_ahead.os, "posix_fadvise", lambda *what: given.append(what[1:]), raising=False)
    (tmp_path / "there").write_bytes(b"0123")
    will_need(tmp_path / "there", [(0, 2), (2, 2)])
    assert [what[:2] for what in given] == [(0, 2), (2, 2)]
    monkeypatch.delattr(read_ahead.os, "posix_fadvise")
    will_need(tmp_path / "there", [(0, 2)])
    assert len(given) == 2
