"""Every run of the witness by name, in one order."""

from functools import partial
from pathlib import Path

from . import evidence, training
from .world import INT8, SUBSPACE, TRUNCATED, make_world

__all__ = ["make_world", "runs"]


def runs(world):
    """Yield each run's name and the function that makes it and returns its evidence by name."""
    yield "subspace", subspaces
    for group in ("gates", "weights", "methods", "when"):
        for name, settings in getattr(training, group.upper()).items():
            folder = f"{group}/{name}"
            yield folder, partial(with_page, training.guarded, world, folder, training.knobs(**settings))
    for name, settings in training.RESUMED.items():
        yield f"resumed/{name}", partial(training.resumed, world, f"resumed/{name}", settings)
    for name, (settings, asked) in training.PROBED.items():
        yield f"probed/{name}", partial(with_page, training.probed, world, f"probed/{name}", settings, asked)
    yield "undone", partial(training.undone, world, "undone", {"gate": "num_layers", "num_layers": 2})


def subspaces():
    """The files that `build_subspace` and `compress_subspace` wrote: what they hold, and every byte."""
    paths = (SUBSPACE, INT8, TRUNCATED)
    return {path: {**evidence.file_digest(path), "bytes": evidence.sha(Path(path).read_bytes())} for path in paths}


def with_page(run, world, folder, *rest):
    """A run, and what the report makes of its journal."""
    found = run(world, folder, *rest)
    return (
        {**found, "report": evidence.page(folder, f"pages/{folder}")}
        if "safemerge.jsonl" in found["journal"]
        else found
    )
