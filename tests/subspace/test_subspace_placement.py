"""Each placement gives the very matrices that the file holds, and keeps what it says it keeps."""

import pytest
import torch

from safemerge_callback.errors import ConfigError
from safemerge_callback.ops import Factored
from safemerge_callback.subspace import Request
from safemerge_callback.subspace.memory import Memory, host_memory
from safemerge_callback.subspace.placement import Device, Host, PlacementInputs, choose, pack
from safemerge_callback.subspace.stack import FromFile

CPU = torch.device("cpu")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class Reader:
    """Random matrices of several forms and sizes, by name; counts what is read."""

    def __init__(self):
        rng = torch.Generator().manual_seed(1)

        def draw(*size):
            return torch.randn(*size, generator=rng)

        self.held = {
            "a": draw(1, 6, 4),
            "b": draw(1, 30, 20).bfloat16(),
            "c": Factored(draw(1, 5, 2), draw(1, 2, 7)),
            "d": draw(1, 3, 3).double(),
        }
        self.reads = []

    def __call__(self, names, transposed):
        self.reads.append(names)
        matrix = self.held[names[0]]
        if not transposed:
            return matrix
        return Factored(matrix.W.mT, matrix.U.mT) if isinstance(matrix, Factored) else matrix.mT


def parts(matrix):
    return list(matrix) if isinstance(matrix, tuple) else [matrix]


def same(left, right):
    assert type(left) is type(right)
    for x, y in zip(parts(left), parts(right), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x.cpu(), y.cpu())


def requests(device, letters="abcd"):
    return [Request((name,), device, transposed) for name in letters for transposed in (False, True)]


@pytest.mark.parametrize("placement", [FromFile, Device, Host])
def test_every_placement_gives_what_is_read(placement):
    read, placed = Reader(), placement()
    for _ in range(2):
        for request, found in zip(requests(CPU), placed.stacks(read, requests(CPU)), strict=True):
            same(found, Reader()(request.names, request.transposed))
    # without a GPU, host memory is the file's pages and nothing is kept twice
    assert len(read.reads) == (8 if placement is Device else 16)


def test_a_device_keeps_by_name_orientation_and_device():
    read, placed = Reader(), Device()
    first, turned = placed.stacks(read, requests(CPU, "b"))
    again, _ = placed.stacks(read, requests(CPU, "b"))
    assert first.data_ptr() == again.data_ptr()
    assert first.shape == (1, 30, 20)
    assert turned.shape == (1, 20, 30)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_packed_bytes_give_the_matrix_back_with_its_strides(name, transposed):
    matrix = Reader()((name,), transposed)
    packed = pack(matrix)
    same(packed.matrix(), matrix)
    assert [p.stride() for p in parts(packed.matrix())] == [p.stride() for p in parts(matrix)]
    longer = torch.cat([packed.storage, torch.full((99,), 7, dtype=torch.uint8)])
    same(packed.matrix(longer), matrix)
    assert all(p.data_ptr() % 64 == packed.storage.data_ptr() % 64 for p in parts(packed.matrix()))


def test_an_expanded_tensor_is_packed_whole():
    matrix = torch.arange(4.0).expand(1, 3, 4)
    same(pack(matrix).matrix(), matrix.contiguous())


@pytest.mark.parametrize("placement", [FromFile, Device, Host])
def test_no_request_is_looked_at_more_than_one_ahead(placement):
    asked = []

    def stream():
        for request in requests(CPU):
            asked.append(request)
            yield request

    for count, _ in enumerate(placement().stacks(Reader(), stream()), start=1):
        assert len(asked) <= count + 1
    assert count == 8


GIB = 1 << 30


def setting(**changed):
    """A GPU of 24 GiB with 20 free, of which 2 may be had; a host of 64 with 40 free, of which 24 may."""
    usual = {"whole": GIB, "share": GIB, "ranks": 1, "again": True, "device": "cuda:0"}
    memory = {"gpu": Memory(20 * GIB, 24 * GIB), "host": Memory(40 * GIB, 64 * GIB)}
    return PlacementInputs(**{**usual, **memory, **changed})


ON_CPU = {"gpu": None, "device": "cpu"}


@pytest.mark.parametrize(
    ("wanted", "changed", "kind", "sharded"),
    [
        ("auto", {}, "device", False),
        ("auto", {"whole": 2 * GIB}, "device", False),
        ("auto", {"whole": 2 * GIB + 1}, "host", False),
        ("auto", {"whole": 12 * GIB}, "host", False),
        ("auto", {"whole": 12 * GIB + 1}, "disk", False),
        ("auto", {"again": False}, "disk", False),
        ("auto", ON_CPU, "disk", False),
        ("auto", {**ON_CPU, "ranks": 4}, "disk", False),
        ("auto", {"ranks": 4}, "device", False),
        ("auto", {"ranks": 4, "whole": 8 * GIB, "share": 2 * GIB}, "device", True),
        ("auto", {"ranks": 4, "whole": 16 * GIB, "share": 4 * GIB}, "host", True),
        ("sharded", {"ranks": 4, "share": GIB // 4}, "device", True),
        ("sharded", {**ON_CPU, "ranks": 4}, "disk", True),
        ("sharded", {}, "device", False),
        ("device", {"whole": 20 * GIB}, "device", False),
        ("host", {"whole": 20 * GIB}, "host", False),
        ("host", ON_CPU, "disk", False),
        ("disk", {}, "disk", False),
    ],
)
def test_the_choice_is_the_nearest_memory_with_room(wanted, changed, kind, sharded):
    choice = choose(wanted, setting(**changed))
    assert (choice.kind, choice.sharded) == (kind, sharded)
    assert choice.bytes == (setting(**changed).share if sharded else setting(**changed).whole)
    assert choice.kind in str(choice)
    assert type(choice.placement()) is {"device": Device, "host": Host, "disk": FromFile}[kind]


def test_the_choice_says_why_with_its_numbers():
    assert "2.0 GiB of the GPU's 20.0 GiB" in choose("auto", setting()).reason
    assert "24.0 GiB of the host's 40.0 GiB" in choose("auto", setting(whole=3 * GIB)).reason
    assert "one process" in choose("sharded", setting()).reason
    assert "cpu" in choose("host", setting(**ON_CPU)).reason


@pytest.mark.parametrize(
    ("wanted", "changed", "said"),
    [
        ("device", ON_CPU, "on cpu"),
        ("device", {"whole": 20 * GIB + 1}, "20.0 GiB are free"),
        ("host", {"whole": 20 * GIB + 1}, "40.0 GiB are free"),
        ("devise", {}, "did you mean 'device'"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(wanted, changed, said):
    with pytest.raises(ConfigError, match=said):
        choose(wanted, setting(**changed))


def test_a_container_has_less_memory_than_its_host(tmp_path):
    whole = host_memory(tmp_path)
    assert 0 < whole.free <= whole.total
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert host_memory(tmp_path).total == whole.total
    (tmp_path / "memory.max").write_text("5000\n")
    assert host_memory(tmp_path) == Memory(4000, 5000)
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert host_memory(tmp_path) == Memory(4300, 5000)
    assert Memory(4000, 5000).beyond(0.25) == 2750
    assert Memory(1000, 5000).beyond(0.25) == 0


class Streams:
    """Stands for the GPU where there is none: copies happen at once, who waits for whom is written down."""

    def __init__(self, monkeypatch):
        log = self.log = []
        empty = torch.empty

        class Stream:
            def __init__(self, device=None):
                self.name = "compute" if device is None else "copy"

            def wait_stream(self, other):
                log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                log.append(f"{self.name} waits for {event}")

            def record_event(self):
                return f"copy {sum(entry == 'copy' for entry in log)}"

        class Within:
            def __init__(self, stream):
                log.append(stream.name)

            def __enter__(self):
                pass

            def __exit__(self, *error):
                pass

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "stream", Within)
        monkeypatch.setattr(torch, "empty", lambda *size, dtype, **_: empty(*size, dtype=dtype))


def test_streaming_from_the_host_orders_copies_and_uses(monkeypatch):
    """The next copy starts before this stack is given, and only after the use of the stack that it overwrites."""
    streams, read, placed = Streams(monkeypatch), Reader(), Host()
    wanted = requests(torch.device("cuda:0"), "abc")
    for turn in range(2):
        streams.log.clear()
        places = []
        for request, found in zip(wanted, placed.stacks(read, iter(wanted)), strict=True):
            same(found, Reader()(request.names, request.transposed))
            streams.log.append("use")
            places.append(parts(found)[0].untyped_storage().data_ptr())
        send = ["copy waits for compute", "copy"]
        middle = [entry for n in range(1, 6) for entry in (*send, f"compute waits for copy {n}", "use")]
        assert streams.log == [*send, *middle, "compute waits for copy 6", "use", "compute waits for copy"]
        assert len(read.reads) == 6, turn
        # once the largest has been seen the two buffers take turns
        assert places[2:4] == places[4:6]
        assert places[2] != places[3]


def test_a_use_that_ends_early_still_waits_for_the_copy_under_way(monkeypatch):
    streams = Streams(monkeypatch)
    stream = Host().stacks(Reader(), requests(torch.device("cuda:0")))
    next(stream)
    stream.close()
    assert streams.log[-1] == "compute waits for copy"


class TestOnAGPU:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("placement", [FromFile, Device, Host])
    def test_every_placement_gives_what_is_read(self, placement):
        gpu, read, placed = torch.device("cuda:0"), Reader(), placement()
        for _ in range(3):
            for request, found in zip(requests(gpu), placed.stacks(read, requests(gpu)), strict=True):
                assert all(p.device == gpu for p in parts(found))
                same(found, Reader()(request.names, request.transposed))
        assert len(read.reads) == (24 if placement is FromFile else 8)

    def test_streaming_from_the_host_holds_two_stacks_and_no_stale_one(self):
        """Sixteen stacks of 64 MiB, each used by slow work, so that a copy that came too early would be seen."""
        gpu, count, side = torch.device("cuda:0"), 16, 4096
        placed, used = Host(), []

        def read(names, transposed):
            return torch.full((1, side, side), float(names[0]))

        wanted = [Request((str(n),), gpu) for n in range(count)]
        list(placed.stacks(read, wanted))
        slow = torch.eye(side, device=gpu)
        slow @ slow
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for matrix in placed.stacks(read, wanted):
            torch.cuda._sleep(20_000_000)
            used.append((slow @ matrix[0])[0, 0].clone())
        # two stacks and a product
        assert torch.cuda.max_memory_allocated() - before <= 3.2 * 4 * side * side
        assert torch.stack(used).tolist() == [float(n) for n in range(count)]

    def test_a_reader_that_leaves_early_frees_the_buffers(self):
        gpu, placed = torch.device("cuda:0"), Host()
        before = torch.cuda.memory_allocated()
        first = next(iter(placed.stacks(Reader(), requests(gpu))))
        same(first, Reader().held["a"])
        del first
        assert torch.cuda.memory_allocated() == before
