"""Hooks that are on a model while a training's own batches pass, and off again whatever happens.

An error ends a training without a word to its callbacks. So what is on a model belongs to a run, and looks at each pass
whether that run's trainer is what makes it; what is not at home any more takes itself off and lets the pass be.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import unwrap
from threading import get_ident
from types import CodeType, FrameType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn


class Run:
    """A call of a trainer's `train`, known by the trainer's state, which is not kept alive.

    `train` is the function, whose first argument is the trainer.
    """

    def __init__(self, state: object, train: Callable[..., Any]) -> None:
        """To be made within that call; where it is none of the calls that led here, no other is told from it."""
        self.state = ref(state)
        self.code: CodeType | None = getattr(unwrap(train), "__code__", None)
        self.thread = get_ident()
        self.known = self._calls()

    @property
    def calls(self) -> bool:
        """Whether it is among the calls that led here; True where that cannot be told.

        Backward passes of a device have a thread of their own, in which nobody is among them.
        """
        return not self.known or self.thread != get_ident() or self._calls()

    def _calls(self) -> bool:
        state = self.state()
        frame: FrameType | None = sys._getframe(1)
        while state is not None and frame is not None:
            # A frame that is asked for its variables holds their values until it ends: no other one is asked.
            if self.code is frame.f_code:
                trainer = frame.f_locals.get(self.code.co_varnames[0])
                if getattr(trainer, "state", None) is state:
                    return True
            frame = frame.f_back
        return False


class BatchHooks:
    """What one name has put on a model in a run; `run` is None where there is none, as in a loop of one's own.

    `whole`: whether it must see the batches of the training whole.
    """

    def __init__(self, run: Run | None, *, whole: bool = True) -> None:
        self.run, self.whole, self.on = run, whole, True
        self.stack = ExitStack()

    def before(self, module: nn.Module, hook: Callable[..., Any], *, first: bool = False) -> None:
        """Call `hook(module, args, kwargs)` before each pass of a module; `first`: before all hooks that it has."""
        handle = module.register_forward_pre_hook(self._at_home(hook), with_kwargs=True, prepend=first)
        self.stack.callback(handle.remove)

    def after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
        """Call `hook(module, args, outputs)` after each pass of a module; `always`: of one that fails, too."""
        self.stack.callback(module.register_forward_hook(self._at_home(hook), always_call=always).remove)

    def _at_home(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        @torch.compiler.disable
        def call(*passed: Any) -> Any:
            if self.on and self.run is not None and not self.run.calls:
                self.close()
            # One that is taken off within a pass may be called in it still.
            return hook(*passed) if self.on else None

        return call

    def close(self) -> None:
        """Take all of it off."""
        self.on = False
        self.stack.close()


# Model -> the run that it is trained in, and what is on it, by name.
_RUNS: WeakKeyDictionary[nn.Module, Run] = WeakKeyDictionary()
_ON: WeakKeyDictionary[nn.Module, dict[str, BatchHooks]] = WeakKeyDictionary()


def hooked(model: nn.Module) -> bool:
    """Return whether anything is on this model now that must be given its batches whole."""
    return any(hooks.on and hooks.whole for hooks in _ON.get(model, {}).values())


def unhook(model: nn.Module, state: object = None) -> None:
    """Take off what an error left on a model when it ended a training, but what is of the run of this state."""
    here = _ON.get(model, {})
    for name, hooks in list(here.items()):
        if state is None or hooks.run is None or hooks.run.state() is not state:
            hooks.close()
            del here[name]


def begin_run(model: nn.Module, state: object, train: Callable[..., Any]) -> None:
    """Let what is put on the model from now on be of the run of this trainer's state; as `Run`."""
    unhook(model, state)
    _RUNS[model] = Run(state, train)


@contextmanager
def batch_hooks(model: nn.Module, name: str, *, whole: bool = True) -> Iterator[BatchHooks]:
    """Yield what puts hooks on the model, to be taken off afterwards; those of the same name are taken off before."""
    here = _ON.setdefault(model, {})
    if before := here.pop(name, None):
        before.close()
    run = _RUNS.get(model)
    here[name] = hooks = BatchHooks(run if run is not None and run.calls else None, whole=whole)
    try:
        yield hooks
    finally:
        hooks.close()
        if here.get(name) is hooks:
            del here[name]
