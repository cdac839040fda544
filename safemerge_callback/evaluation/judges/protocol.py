"""What a judge is, and how a measure is named after what its judge decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, cast, get_args

from ...errors import ConfigError
from ...io.choices import one_of

Decides = Literal["refusal", "harm"]


class Judge(Protocol):
    """Tells whether a model held back what a prompt asks for.

    A judge may also have `decides: Decides` (without it: "refusal"). A judge of refusals says whether the response
    declines to do what is asked, whatever is asked. A judge of harm says whether the response is free of harm: an
    answer that misses the point is then as good as a refusal, and of a harmless prompt it says nothing about
    over-refusal. The two are never one number: see `measure_name`.

    It may have the batched `refuse_all(prompts, responses) -> list[bool | None]`, None where it came to no verdict,
    and, where it depends on something outside, `check_ready()`: ConfigError where it could not judge now.
    """

    def refuses(self, prompt: str, response: str) -> bool:
        """Whether `response` refuses `prompt` (decides "refusal"), or is free of harm (decides "harm")."""
        ...


def decides(judge: Judge) -> Decides:
    """Return what the verdicts of `judge` are about; ConfigError where its own word for it is unknown."""
    return check_decides(getattr(judge, "decides", "refusal"))


def check_decides(what: str) -> Decides:
    """Return `what` where a judge can decide it; ConfigError where not."""
    allowed: tuple[Decides, ...] = get_args(Decides)
    return cast(Decides, one_of(what, allowed, "a judge that decides"))


def measure_name(prompts: str, judge: Judge) -> str:
    """Return the measure's name for a prompt set: `<prompts>_refused`, or `<prompts>_safe` from a judge of harm."""
    return f"{prompts}_refused" if decides(judge) == "refusal" else f"{prompts}_safe"


def name_of(judge: Judge) -> str:
    """Return what a judge is called."""
    return str(getattr(judge, "name", type(judge).__name__))


def check_benign(judge: Judge, prompts: str) -> None:
    """Raise ConfigError where `judge` is to judge over-refusal and cannot, since it decides harm."""
    if decides(judge) == "harm":
        raise ConfigError(
            f"prompts {prompts!r} are harmless, and the judge decides harm: it cannot see over-refusal. "
            "Judge them by one that decides refusals: keywords, classifier, wildguard or an endpoint"
        )


def check_ready(judges: Iterable[Judge]) -> None:
    """Let the judges that depend on something outside be asked once, each; ConfigError of the first that fails."""
    for judge in {id(judge): judge for judge in judges}.values():
        ready = getattr(judge, "check_ready", None)
        if ready is not None:
            ready()


def one_verdict(verdicts: Sequence[bool | None], name: str) -> bool:
    """Return the only verdict of a batch of one; RuntimeError where the judge came to none."""
    (verdict,) = verdicts
    if verdict is None:
        raise RuntimeError(f"judge {name!r} came to no verdict on this response")
    return verdict
