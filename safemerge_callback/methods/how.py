"""How two updates become one: a method with its knobs, checked when made, then asked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from ..errors import ConfigError
from ..io.knobs import checked, named_values, refuse_idle, unknown_knob
from ..ops import LowRank
from .registry import Merged, Method, get_method, knobs, readers
from .weights import DEFAULT_WEIGHTS, check_merge, merge_weights

# What stands for `linear` or `pull`, by what is there.
AUTO = "auto"
# The knobs that all methods have in common.
_COMMON = ("space", "weights", "strength")


class MethodKnobs(TypedDict, total=False):
    """The knobs of the methods here, by name, for type checkers: each is declared where it is read."""

    density: float | None
    majority_sign_method: str
    operator: str | None
    operator_rank: int | None
    mu: float
    ridge: float
    off_diagonal: float
    prune_share: float


class HowKnobs(MethodKnobs, total=False):
    """The knobs of `How` but the method, by name: of methods, and what they have in common."""

    space: str
    weights: Sequence[float] | None
    strength: float | None


@dataclass(frozen=True)
class How:
    """A method's name, its space, the weights that were asked for and its own knobs; ConfigError for what cannot be.

    `weights`: (w_live, w_safety, ...), one for each safety adapter; (0.8, 0.2) where none are given. `knobs`: name ->
    value of each knob that the method has declared, those that are left out at their defaults; one of another method is
    refused unless it is at its own.
    """

    method: str
    space: str = "delta"
    weights: tuple[float, ...] = DEFAULT_WEIGHTS
    knobs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        weights, method_knobs = (
            check_merge(self.method, self.space, self.weights),
            {knob.name for knob in self.kind.knobs},
        )
        declared = knobs()
        for name, value in named_values(self.knobs).items():
            if name not in declared:
                raise unknown_knob(name, how_knobs(), "a merge")
            if name not in method_knobs:
                refuse_idle(declared[name], value, "method", self.method, readers(name))
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "knobs", checked(self.kind.knobs, self.knobs, method=self.method))

    @property
    def kind(self) -> Method:
        """What the method says of itself."""
        return get_method(self.method)

    @property
    def strength(self) -> float | None:
        """The share of the way to its target that the method goes; None for one that goes to none, or all the way."""
        return self.knobs.get("strength") if self.kind.strength is None else self.weights[1]

    @property
    def needs(self) -> frozenset[str]:
        """What must be there: what the method needs, and the values of its knobs beyond that."""
        more = (knob.needs.get(self.knobs[knob.name], frozenset()) for knob in self.kind.knobs)
        return self.kind.needs.union(*more)

    @property
    def additive(self) -> bool:
        """Whether the result is Σ wᵢ·ΔWᵢ in this space."""
        return self.space in self.kind.additive

    @property
    def taken(self) -> dict[str, Any]:
        """The method's own knobs and their values, less what says nothing: what the journal adds."""
        return {name: value for name, value in self.knobs.items() if value is not None}

    def merge(self, live: LowRank, safety: Sequence[LowRank], **keywords: Any) -> Merged:
        """Merge a batch of modules as `Method.merge` does; `keywords` as there, which go before what is asked here."""
        settings = {"space": self.space, "weights": self.weights, **self.knobs}
        return self.kind.merge(live, safety, **(settings | keywords))


def how_knobs() -> tuple[str, ...]:
    """Return the names of all knobs that say how: those that methods have in common, and those that they declare."""
    return tuple(dict.fromkeys((*_COMMON, *knobs())))


def method_of(
    method: str,
    adapters: int | None,
    weights: Sequence[float] | None = None,
    module_weights: Collection[Any] | None = None,
    space: str = "delta",
) -> str:
    """Return `method`, or what `auto` stands for: `pull` where no safety adapter is named, else `linear`.

    `adapters`: how many are; None where they are named later, as those of a plan are when it is applied. Weights, those
    of modules, and a space that `pull` has not, tell of one to come.
    """
    if method != AUTO:
        return method
    has_adapter = adapters != 0 or weights is not None or module_weights or space not in get_method("pull").spaces
    return "linear" if has_adapter else "pull"


def as_how(method: str | How, settings: Mapping[str, Any], adapters: int | None = None) -> How:
    """Return `method`, or the method of that name with these settings, those of `how_knobs`.

    `adapters`: how many safety adapters there are, None where that is not known yet. A method with a strength has
    weights (1 - strength, strength). ConfigError for a `How` beside settings, a setting that is none, and as `How` and
    `merge_weights`.
    """
    if isinstance(method, How):
        if settings:
            raise ConfigError(f"knobs {sorted(settings)} were given beside a How: make the How with them")
        return method
    # One may have for itself what others have in common.
    itself = {knob.name for knob in get_method(method).knobs}
    method_knobs = {name: value for name, value in settings.items() if name not in _COMMON or name in itself}
    strength = None if "strength" in itself else settings.get("strength")
    weights = merge_weights(method, settings.get("weights"), strength, adapters)
    return How(method, settings.get("space", "delta"), weights, method_knobs)  # type: ignore[arg-type]
