"""`python -m safemerge_callback.cli`."""

from . import main

main()
