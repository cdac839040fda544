"""A model on the Hub, read in place by range requests, nothing on disk; apart, since it alone needs a network."""

from __future__ import annotations

from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import SafeMergeError, SubspaceError, first_line
from ...io.documents import parse_json
from ...io.hub import Commit, client_errors, gated
from ..header import DTYPES
from .shard_files import _AGAIN, ShardFile, unreadable

# One request fetches at most this much, so that a fault costs little and a tensor needs little more than itself.
CHUNK = 32 * 2**20
# Asked for at once: the headers of nearly all files are shorter.
_FIRST = 256 * 2**10
_LONGEST_HEADER = 100 * 10**6


class HubFolder(NamedTuple):
    """The files of a model at one commit."""

    repo: str
    commit: Commit

    def names(self) -> list[str]:
        """Return the names of the files at the top; Mistral's second copy of the weights is left out."""
        return [name for name in self.commit.files if not name.startswith("consolidated")]

    def text(self, name: str) -> str:
        """Return the content of a small file."""
        try:
            return _get(self.repo, self._url(name)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise SubspaceError(f"checkpoint {self.repo!r}: {name} is no text ({error}). {_AGAIN}") from error

    def shard(self, name: str) -> ShardFile:
        """Return one of its safetensors files; nothing is fetched yet."""
        return HubFile(self.repo, name, self._url(name))

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, name, revision=self.commit.sha)


class HubFile:
    """A safetensors file on the Hub. The header is fetched once and kept; values are fetched at each `read`."""

    def __init__(self, repo: str, name: str, url: str) -> None:
        self._repo, self._name, self._url = repo, name, url

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return self._name

    def size(self) -> int:
        """Return how many bytes the file has."""
        return self._start[1]

    def header(self) -> bytes:
        """Return the header with its length in front."""
        return self._start[0]

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return what the header lists."""
        return {key: (shape, dtype) for key, (shape, dtype, _) in self._entries.items()}

    def read(self, key: str, start: int, count: int) -> Tensor:
        """Fetch these values, and no others, into memory; a request that fails is made again."""
        _, dtype, offset = self._entries[key]
        values = torch.empty(count, dtype=DTYPES[dtype], device="cpu")
        target = values.view(torch.uint8).numpy()
        first = len(self.header()) + offset + start * values.element_size()
        for done in range(0, len(target), CHUNK):
            length = min(CHUNK, len(target) - done)
            target.data[done : done + length] = self._range(first + done, length)
        return values

    def _range(self, first: int, length: int) -> bytes:
        data = _get(self._repo, self._url, (first, first + length - 1))
        if len(data) != length:
            raise unreadable(self._name, f"{len(data)} of {length} bytes came from the Hub")
        return data

    @cached_property
    def _start(self) -> tuple[bytes, int]:
        """The header with its length in front, and the file's size."""
        data, size = _first_bytes(self._repo, self._url, _FIRST)
        whole = 8 + int.from_bytes(data[:8], "little")
        if len(data) < 8 or whole > min(size, _LONGEST_HEADER):
            raise unreadable(self._name, f"{size} bytes cannot hold the header that it announces")
        if whole > len(data):
            data += self._range(len(data), whole - len(data))
        return data[:whole], size

    @cached_property
    def _entries(self) -> dict[str, tuple[tuple[int, ...], str, int]]:
        """Key -> shape, dtype, and where the values begin behind the header."""
        header, size = self._start
        try:
            listed = {k: v for k, v in parse_json(header[8:], "the header").items() if k != "__metadata__"}
            entries = {k: (tuple(v["shape"]), v["dtype"], *v["data_offsets"]) for k, v in listed.items()}
            for key, (shape, dtype, begin, end) in entries.items():
                known = dtype not in DTYPES or end - begin == prod(shape) * DTYPES[dtype].itemsize
                if not known or not 0 <= begin <= end <= size - len(header):
                    raise ValueError(f"{key!r} lies outside the file")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise unreadable(self._name, error) from error
        return {key: (shape, dtype, begin) for key, (shape, dtype, begin, _) in entries.items()}


def _get(repo: str, url: str, span: tuple[int, int] | None = None) -> bytes:
    """The body, or the bytes from the first to the last of `span`; the client itself tries again on a fault."""
    from huggingface_hub.utils import hf_raise_for_status, http_backoff

    try:
        # A body that is cut off is no fault to all clients.
        again = client_errors()[0]
        response = http_backoff("GET", url, headers=_headers(span), timeout=60, retry_on_exceptions=again)
        hf_raise_for_status(response)
    except client_errors() as error:
        raise _failed(repo, error) from error
    return response.content


def _first_bytes(repo: str, url: str, length: int) -> tuple[bytes, int]:
    """The first `length` bytes, or all of a shorter file, and the file's size; nothing more is ever downloaded."""
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

    try:
        with http_stream_backoff("GET", url, headers=_headers((0, length - 1)), timeout=60) as response:
            hf_raise_for_status(response)
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if response.status_code != 206 or not total.isdecimal():
                raise SubspaceError(
                    f"checkpoint {repo!r}: the server gives no parts of files (range requests). Download the model "
                    f"first (`hf download {repo}`)."
                )
            data = _read_or_none(response)
    except client_errors() as error:
        raise _failed(repo, error) from error
    # The client tries a request again, but not the reading of a streamed answer.
    return data if data is not None else _get(repo, url, (0, min(length, int(total)) - 1)), int(total)


def _read_or_none(response: Any) -> bytes | None:
    try:
        return bytes(response.read())
    except client_errors():
        return None


def _headers(span: tuple[int, int] | None) -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    headers = {**build_hf_headers(library_name="safemerge"), "Accept-Encoding": "identity"}
    return headers if span is None else {**headers, "Range": f"bytes={span[0]}-{span[1]}"}


def _failed(repo: str, error: Exception) -> SafeMergeError:
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, SubspaceError):
        return error
    if isinstance(error, GatedRepoError):
        return gated(repo, "checkpoint", SubspaceError)
    return SubspaceError(
        f"checkpoint {repo!r} could not be fetched from the Hub: {first_line(error)}. Start again, or download it "
        f"first (`hf download {repo}`)."
    )
