"""How a recipe ends that is called by its name: as the verbs of `safemerge` do."""

from __future__ import annotations

import sys
from collections.abc import Callable

from safemerge_callback.errors import SafeMergeError
from safemerge_callback.io.printable import printable


def run_command(main: Callable[[], None]) -> None:
    """Call a recipe's `main`; what this package refuses is one message on stderr, and exit code 2."""
    try:
        main()
    except SafeMergeError as error:
        print(printable(f"safemerge: {error}"), file=sys.stderr)
        sys.exit(2)
