"""How much memory is free now: of a GPU, of the host, of what a container may have of it."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

# Limit, use and details of a control group, as its two versions name them.
_GROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
_GROUPS = Path("/sys/fs/cgroup")


class Memory(NamedTuple):
    """Bytes of one kind of memory."""

    free: int
    total: int

    def beyond(self, reserve: float) -> int:
        """Return the free bytes beyond a `reserve`, a share of the total that is not to be used."""
        return max(0, self.free - int(reserve * self.total))


def device_memory(device: torch.device) -> Memory:
    """Return what is free on a CUDA device, what the allocator holds without using it too."""
    free, total = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Memory(free + idle, total)


def host_memory(groups: Path = _GROUPS) -> Memory:
    """Return what is available of the host's memory, or of what the container's control group may still use."""
    try:
        now = import_module("psutil").virtual_memory()
        memory = Memory(now.available, now.total)
    except ImportError:
        page = os.sysconf("SC_PAGE_SIZE")
        memory = Memory(page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES"))
    for names in _GROUP_FILES:
        limited = _group(*(groups / name for name in names))
        if limited is not None and limited.total < memory.total:
            memory = Memory(min(memory.free, limited.free), limited.total)
    return memory


def _group(limit: Path, used: Path, details: Path) -> Memory | None:
    """What a control group allows, file pages that it can drop not counted as used; None without such a limit."""
    try:
        total, spent = int(limit.read_text()), int(used.read_text())
        lines = details.read_text().splitlines() if details.is_file() else []
        idle = dict(line.split() for line in lines if len(line.split()) == 2)
        spent -= int(idle.get("total_inactive_file", idle.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
    return Memory(max(0, total - spent), total)
