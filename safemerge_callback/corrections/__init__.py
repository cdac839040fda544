"""Floor 7: what is done to a run, and when: changes of its factors, terms of its gradient, and the state they keep.

A correction is a file; its name is its name in YAML. Importing the folder fills the registry: a file of a new one is
imported here.
"""

from . import merge, replay

__all__ = ["merge", "replay"]
