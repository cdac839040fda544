"""Checkpoints of a model, wherever they lie and however they are laid out, one weight at a time."""

from .shards import CheckpointShards

__all__ = ["CheckpointShards"]
