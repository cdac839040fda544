"""Safety rows in the words of the tests' chat tokenizer, and a callback that replays them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safemerge_callback import SafeMergeCallback

ROWS = [
    {"prompt": "a b c", "response": "w0 w1 w2", "kind": "harm"},
    {"prompt": "d e", "response": "w3 w4", "kind": "harm"},
    {"prompt": "f g h i", "response": "yes w5 w6 w7", "kind": "benign"},
]


def replay_entry(**settings: Any) -> dict[str, Any]:
    """`replay` as a list of corrections has it."""
    return {"replay": {"rows": ROWS, **settings}}


def replaying(**settings: Any) -> SafeMergeCallback:
    """The callback without a subspace, which only replays."""
    from safemerge_callback import SafeMergeCallback

    return SafeMergeCallback(corrections=[replay_entry(**settings)])
