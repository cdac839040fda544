"""Every run of the witness by name, in one order."""

import shutil
from functools import partial
from pathlib import Path

from . import evidence, files, hosts, training
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
    yield from hosted(world)
    for name, settings in files.merges().items():
        yield f"offline/{name}", partial(files.merged, f"offline/{name}", settings)
        if "bake" not in settings:
            yield f"live/{name}", partial(files.live, world, f"live/{name}", settings)
    yield "sweeps", files.sweeps
    yield "loop", partial(files.loop, world)
    yield "commands", files.commands


def hosted(world):
    """Runs in other hands, and a probed run's pictures."""
    yield "hosts/sft", partial(hosts.sft, world, "hosts/sft")
    yield "hosts/tracked", partial(hosts.tracked, world, "hosts/tracked")
    for name, how in hosts.HOW.items():
        folder = f"hosts/{name}"
        yield folder, partial(training.guarded, world, folder, training.knobs(), **how)
    yield "plots", partial(plotted, world, "plots")


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


def plotted(world, folder):
    """A run under a probe, and its pictures."""
    found = training.probed(world, folder, {"gate": "calibrated", "z_threshold": -0.6}, {})
    return {"journal": found["journal"], **files.plots(folder)}


def taken_over(world, other):
    """Yield as `runs` does what is made of the files that another package left in the folder `other`.

    Its journals are reported, and its checkpoints gone on with: the same evidence as its own.
    """
    for path in sorted((other / "pages").rglob("safemerge.jsonl")):
        place = path.parent.relative_to(other)
        yield str(place.relative_to("pages")), partial(_reported_copy, path, place)
    for name, settings in training.RESUMED.items():
        if (other / f"resumed/{name}").exists():
            yield f"resumed/{name}", partial(_gone_on, world, other, f"resumed/{name}", settings)


def _reported_copy(path, place):
    place.mkdir(parents=True)
    shutil.copy(path, place)
    return {"report": evidence.reported(place)}


def _gone_on(world, other, folder, settings):
    again = training.gone_on(world, other / folder / "whole", f"{folder}/part", settings)
    return {f"resumed-{name}": value for name, value in again.items()}
