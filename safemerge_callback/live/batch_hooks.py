"""Hooks that are on a model while a training's own batches pass, and off again whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from torch import nn

# Model -> whose hooks are on it, and what takes them off again.
_ON: WeakKeyDictionary[nn.Module, dict[str, ExitStack]] = WeakKeyDictionary()


def hooked(model: nn.Module) -> bool:
    """Return whether somebody's hooks are on this model now: such a one must be given its batches whole."""
    return bool(_ON.get(model))


def unhook(model: nn.Module) -> None:
    """Take off what an error left on a model when it ended a training within a step, whoever put it there."""
    for stack in list(_ON.get(model, {}).values()):
        stack.close()


@contextmanager
def batch_hooks(model: nn.Module, name: str) -> Iterator[ExitStack]:
    """Yield what takes off, afterwards, what is put on it within: `stack.callback(hook.remove)`.

    Those of the same name that an error left on are taken off before, as all are by `unhook`.
    """
    stacks = _ON.setdefault(model, {})
    if before := stacks.pop(name, None):
        before.close()
    with ExitStack() as stack:
        stacks[name] = stack
        stack.callback(stacks.pop, name, None)
        yield stack
