"""`python -m safemerge_callback`: the `safemerge` command."""

from .cli import main

main()
