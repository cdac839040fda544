"""Floor 3: the safety subspace of a model: aligned - unaligned, module by module, in one file."""

from .build import build_subspace
from .checkpoints.shards import CheckpointShards
from .compress import COMPRESSED, compress_subspace
from .file import Subspace
from .header import FORMAT, VERSION, ModuleHeader
from .stack import Placement, Read, Request

__all__ = [
    "COMPRESSED",
    "FORMAT",
    "VERSION",
    "CheckpointShards",
    "ModuleHeader",
    "Placement",
    "Read",
    "Request",
    "Subspace",
    "build_subspace",
    "compress_subspace",
]
