"""Floor 2: the safety subspace of a model: aligned - unaligned, module by module, in one file."""

from .build import build_subspace
from .file import Request, Subspace
from .header import FORMAT, VERSION, ModuleHeader
from .shards import CheckpointShards

__all__ = ["FORMAT", "VERSION", "CheckpointShards", "ModuleHeader", "Request", "Subspace", "build_subspace"]
