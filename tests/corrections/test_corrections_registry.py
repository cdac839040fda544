"""What is entered has a file, a card and a test of its name; a file that enters one is imported by the folder."""

import re
from pathlib import Path

import pytest

from safemerge_callback.corrections.registry import CORRECTIONS, correction
from safemerge_callback.corrections.schedule import Schedule

ROOT = Path(__file__).parents[2]
FOLDER = "safemerge_callback/corrections"


def missing(names, root):
    """What each of these corrections lacks, by path."""
    places = (FOLDER + "/{}.py", "docs/corrections/{}.md", "tests/corrections/test_corrections_{}.py")
    return [place.format(name) for name in names for place in places if not (root / place.format(name)).is_file()]


def entered(root):
    """The names that the files of the folder enter."""
    text = "\n".join(path.read_text() for path in sorted((root / FOLDER).glob("*.py")))
    return set(re.findall(r"^@correction\([^@]*?^def (\w+)\(", text, re.MULTILINE | re.DOTALL))


def test_every_correction_has_its_file_card_and_test():
    assert missing(CORRECTIONS, ROOT) == []


def test_every_file_that_enters_one_is_imported():
    assert entered(ROOT) == set(CORRECTIONS)


def test_what_is_forgotten_is_named(tmp_path):
    path = tmp_path / FOLDER / "replay.py"
    path.parent.mkdir(parents=True)
    path.write_text('@correction(\n    Replay,\n    cost="one",\n)\ndef replay(settings):\n    return 1\n')
    assert entered(tmp_path) == {"replay"}
    assert missing(entered(tmp_path), tmp_path) == [
        "docs/corrections/replay.md",
        "tests/corrections/test_corrections_replay.py",
    ]


def test_a_need_or_an_engine_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"'harmful'. are no needs"):
        correction(Schedule, cost="none", needs={"harmful"})
    with pytest.raises(ValueError, match="'FSDP3'"):
        correction(Schedule, cost="none", engines={"FSDP3"})


def test_the_page_adds_one_as_it_says(world, runs, tmp_path):
    page = (ROOT / "docs" / "corrections.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    before = dict(CORRECTIONS)
    try:
        exec(compile(code, "docs/corrections.md", "exec"), {"__name__": "page"})
        assert CORRECTIONS["decay"].cost == "no pass of the model"
        guard = world.guard(gate="watch", safety_adapter=None, corrections=[{"decay": {"weight": 0.1}}])
        world.trainer(tmp_path, guard, max_steps=2).train()
        assert [e["weight"] for e in runs.entries(tmp_path, "gradient")] == [0.1, 0.1]
    finally:
        CORRECTIONS.clear()
        CORRECTIONS.update(before)
