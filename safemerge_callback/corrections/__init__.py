"""Floor 7: what is done to a run, and when: to its factors, its gradient, its batches; and the state that is kept.

A correction is a file; its name is its name in YAML. Importing the folder fills the registry: a file of a new one is
imported here.
"""

from . import (
    booster,
    constrained,
    lisa,
    merge,
    panacea,
    panacea_term,
    replay,
    safegrad,
    t_vaccine,
    vaccine,
)

__all__ = [
    "booster",
    "constrained",
    "lisa",
    "merge",
    "panacea",
    "panacea_term",
    "replay",
    "safegrad",
    "t_vaccine",
    "vaccine",
]
