"""One name in five places: what a registry holds has a file, a key, a card, a value in YAML and a test of its name.

A new registry is one more line of the table.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from safemerge_callback import SafeMergeConfig
from safemerge_callback.corrections.losses import LOSSES
from safemerge_callback.corrections.registry import CORRECTIONS
from safemerge_callback.decision import GATES
from safemerge_callback.decision.weights import WEIGHTS
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.judges import JUDGES, check_judge
from safemerge_callback.io.knobs import Knob
from safemerge_callback.methods import METHODS
from safemerge_callback.signals.minimisers import MINIMISERS, get_minimiser
from safemerge_callback.signals.objectives import OBJECTIVES, get_objective
from safemerge_callback.training.trackers import TRACKERS, known

ROOT = Path(__file__).parents[1]
# Other tests of the same process enter corrections of their own.
OURS = [name for name, kind in CORRECTIONS.items() if kind.make.__module__.startswith("safemerge_callback.")]


def config(**settings: Any) -> SafeMergeConfig:
    """A run's settings, read from YAML."""
    return SafeMergeConfig.from_dict(yaml.safe_load(yaml.safe_dump({"subspace": "s", **settings})))


def knob_of(rule: str) -> str:
    """What puts a weights rule in force: users know it by that alone. One that always holds reads `weights`."""
    knob = WEIGHTS[rule].knob if rule in WEIGHTS else rule
    return knob.name if isinstance(knob, Knob) else knob or "weights"


@dataclass(frozen=True)
class Registry:
    """Where a registry's entries are: `marks` is the line by which a file of `folder` enters one.

    `card` and `test` are a file a name, with `{}` for it, or a page or folder that must hold the name. `take` is given
    a name as YAML has it. `word` is what users call an entry.
    """

    names: Collection[str]
    folder: str
    marks: str
    card: str
    take: Callable[[str], object]
    test: str
    word: Callable[[str], str] = str

    def entered(self, root: Path = ROOT) -> set[str]:
        """The names of the files that enter something."""
        files = sorted((root / self.folder).glob("*.py"))
        return {path.stem for path in files if re.search(self.marks, path.read_text(), re.MULTILINE)}

    def missing(self, root: Path = ROOT) -> list[str]:
        """What the entries lack, by place; an entry is whatever has a key or a file."""
        entered, lacks = self.entered(root), []
        for name in sorted({*entered, *self.names}):
            word = self.word(name)
            places = [place for place in (self.card, self.test) if not holds(root, place, word)]
            lacks += [] if name in entered else [f"{self.folder}/{name}.py"]
            lacks += [] if name in self.names else [f"{name!r} in the registry: {self.folder} imports no such file"]
            lacks += [place.format(word) if "{}" in place else f"{word!r} in {place}" for place in places]
        return lacks


def holds(root: Path, place: str, word: str) -> bool:
    """Whether a file of that name is there, a page has the word as code, or a folder's tests as a text or keyword."""
    if "{}" in place:
        return (root / place.format(word)).is_file()
    if (root / place).is_dir():
        texts = (path.read_text(encoding="utf-8") for path in (root / place).glob("test_*.py"))
        return any(re.search(rf"[\"'/]{word}[\"':]|\b{word}=", text) for text in texts)
    return (root / place).is_file() and bool(re.search(rf"`{word}\b", (root / place).read_text(encoding="utf-8")))


REGISTRIES: Mapping[str, Registry] = {
    "methods": Registry(
        METHODS,
        "safemerge_callback/methods",
        r"^@register\(",
        "docs/methods/{}.md",
        lambda name: config(method=name),
        "tests/methods",
    ),
    "gates": Registry(
        GATES,
        "safemerge_callback/decision/gates",
        r"^@gate\(",
        "docs/gates.md",
        lambda name: config(gate=name),
        "tests/decision",
    ),
    "weights": Registry(
        WEIGHTS,
        "safemerge_callback/decision/weights",
        r"^@weights_rule\(",
        "docs/actions.md",
        lambda name: config(**{knob_of(name): None}),
        "tests/decision",
        knob_of,
    ),
    "corrections": Registry(
        OURS,
        "safemerge_callback/corrections",
        r"^@correction\(",
        "docs/corrections.md",
        lambda name: config(corrections=[{name: {}}]),
        "tests/corrections/test_corrections_{}.py",
    ),
    "losses": Registry(
        LOSSES,
        "safemerge_callback/corrections/losses",
        r"^@row_loss\(",
        "docs/replay.md",
        lambda name: config(corrections=[{"replay": {"loss": name}}]),
        "tests/corrections",
    ),
    "objectives": Registry(
        OBJECTIVES,
        "safemerge_callback/signals/objectives",
        r"^@objective\(",
        "docs/search.md",
        get_objective,
        "tests/signals",
    ),
    "minimisers": Registry(
        MINIMISERS,
        "safemerge_callback/signals/minimisers",
        r"^@minimiser\(",
        "docs/search.md",
        get_minimiser,
        "tests/signals",
    ),
    "judges": Registry(
        JUDGES,
        "safemerge_callback/evaluation/judges",
        r"^class \w+Judge:",
        "docs/judges.md",
        check_judge,
        "tests/evaluation",
    ),
    "trackers": Registry(
        TRACKERS,
        "safemerge_callback/training/trackers",
        r"^class \w+Tracker:",
        "docs/metrics.md",
        lambda name: known([name]),
        "tests/training",
    ),
}
ENTRIES = [(registry, name) for registry, found in REGISTRIES.items() for name in found.names]


@pytest.mark.parametrize("registry", REGISTRIES)
def test_one_name_in_five_places(registry):
    missing = REGISTRIES[registry].missing()
    assert not missing, "forgotten:\n" + "\n".join(missing)


def unknown(registry: str, name: str) -> bool:
    """Whether a name is refused as no name; a setting that an entry needs beside it may be missing here."""
    try:
        REGISTRIES[registry].take(name)
    except ConfigError as error:
        return "is unknown" in str(error)
    return False


@pytest.mark.parametrize(("registry", "name"), ENTRIES)
def test_the_fifth_is_its_value_in_yaml(registry, name):
    assert not unknown(registry, name)


@pytest.mark.parametrize("registry", REGISTRIES)
def test_a_name_that_no_file_has_is_refused(registry):
    assert unknown(registry, "nosuch")


@pytest.mark.parametrize("registry", REGISTRIES)
def test_what_is_forgotten_is_named(tmp_path, registry):
    """A file alone, with nothing that should come with it."""
    found = replace(REGISTRIES[registry], names=())
    (tmp_path / found.folder).mkdir(parents=True)
    line = found.marks.removeprefix("^").replace(r"\w+", "Replay").replace("\\", "")
    (tmp_path / found.folder / "replay.py").write_text(f"import os\n\n\n{line}\n")
    assert found.entered(tmp_path) == {"replay"}
    unentered, card, test = found.missing(tmp_path)
    assert unentered == f"'replay' in the registry: {found.folder} imports no such file"
    for place, lack in ((found.card, card), (found.test, test)):
        assert lack == (place.format("replay") if "{}" in place else f"'replay' in {place}")
