"""Judges by name, so that a YAML file or a command line can say which."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ConfigError
from ...io.callables import check_callable
from ...io.choices import one_of
from .classifier import ClassifierJudge
from .endpoint import endpoint_at
from .function import FunctionJudge, imported
from .keywords import KeywordJudge
from .llamaguard import LlamaGuardJudge
from .protocol import Decides, Judge, check_decides, decides
from .shieldgemma import ShieldGemmaJudge
from .wildguard import WildGuardJudge

JUDGES: dict[str, Callable[..., Judge]] = {
    "keywords": KeywordJudge,
    "classifier": ClassifierJudge,
    "llamaguard": LlamaGuardJudge,
    "wildguard": WildGuardJudge,
    "shieldgemma": ShieldGemmaJudge,
    "endpoint": endpoint_at,
    "function": imported,
}
# What may follow the name after a colon; keywords take nothing.
_ARGUMENT = {
    "classifier": "a folder or Hub id",
    "llamaguard": "a folder or Hub id",
    "wildguard": "a folder or Hub id",
    "shieldgemma": "a folder or Hub id",
    "endpoint": "MODEL@URL",
    "function": "package.module:name",
}
_NEEDED = {"endpoint", "function"}


def check_judge(which: str) -> None:
    """Raise ConfigError for a judge's name that `load_judge` would not take, by its spelling alone."""
    _spelled(which)


def decided_by(which: str, decides: str | None = None) -> Decides:
    """Return what the judge of this name decides, or is asked to, before it is loaded; ConfigError as `check_judge`."""
    name, _ = _spelled(which)
    of_all: str = getattr(JUDGES[name], "decides", "refusal")
    return check_decides(decides or of_all)


def load_judge(which: str | Mapping[str, Any] | Judge | Callable[[str, str], bool]) -> Judge:
    """Return the judge that `which` means, its model loaded (so that what is wrong shows before training starts).

    `which` is `NAME` or `NAME:ARGUMENT` (`classifier:FOLDER`, `llamaguard:HUB_ID`, `endpoint:MODEL@URL`,
    `function:package.module:name`), a mapping with `name` and the judge's own options, a judge, or a function of
    prompt and response. Raises ConfigError where the name, an option or the model does not exist.
    """
    if isinstance(which, str):
        return _judge_of(which, {})
    if isinstance(which, Mapping):
        options = dict(which)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"judge {sorted(which)} has no name: add name, one of {list(JUDGES)}")
        return _judge_of(name, options)
    if hasattr(which, "refuses"):
        decides(which)
        who = f"judge {type(which).__name__}"
        check_callable(which.refuses, f"{who}: refuses", ("prompt", "response"), "a bool")
        if hasattr(which, "refuse_all"):
            check_callable(which.refuse_all, f"{who}: refuse_all", ("prompts", "responses"), "a list of bool or None")
        return which
    return FunctionJudge(which)


def _spelled(spec: str) -> tuple[str, str]:
    """The name and its argument."""
    name, colon, argument = spec.partition(":")
    one_of(name, JUDGES, "judge")
    if bool(colon) and (name not in _ARGUMENT or not argument):
        raise ConfigError(f"judge {spec!r}: {name} takes {_ARGUMENT.get(name, 'nothing')} after the colon")
    if name in _NEEDED and not argument:
        raise ConfigError(f"judge {spec!r} is not complete: write {name}:{_ARGUMENT[name]}")
    return name, argument


def _judge_of(spec: str, options: dict[str, Any]) -> Judge:
    name, argument = _spelled(spec)
    make = JUDGES[name]
    try:
        inspect.signature(make).bind(*([argument] if argument else []), **options)
    except TypeError as error:
        known = [p.name for p in inspect.signature(make).parameters.values() if p.kind is not p.VAR_KEYWORD]
        raise ConfigError(f"judge {name!r} cannot be made from {sorted(options)}: {error}. It takes {known}") from None
    return make(*([argument] if argument else []), **options)
