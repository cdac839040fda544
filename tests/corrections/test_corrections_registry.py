"""What may be entered; that an entry has a file, a card and a test of its name is seen in tests/test_registries.py."""

import re
from pathlib import Path

import pytest

from safemerge_callback.corrections.registry import CORRECTIONS, correction
from safemerge_callback.corrections.schedule import Schedule

ROOT = Path(__file__).parents[2]


def test_a_need_or_an_engine_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"'harmful'. are no needs"):
        correction(Schedule, cost="none", needs={"harmful"})
    with pytest.raises(ValueError, match="'FSDP3'"):
        correction(Schedule, cost="none", engines={"FSDP3"})


def test_the_page_adds_one_as_it_says(world, runs, tmp_path):
    page = (ROOT / "docs" / "corrections.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.partition("## One of your own")[2], re.DOTALL))
    before = dict(CORRECTIONS)
    try:
        exec(compile(code, "docs/corrections.md", "exec"), {"__name__": "page"})
        assert CORRECTIONS["decay"].cost == "no pass of the model"
        guard = world.guard(
            gate="watch", safety_adapter=None, corrections=[{"decay": {"weight": 0.1}}, {"flatness": {}}]
        )
        world.trainer(tmp_path, guard, max_steps=2).train()
        told = [(e["correction"], e["weight"]) for e in runs.entries(tmp_path, "gradient")]
        assert told == [("decay", 0.1), ("flatness", 0.01)] * 2
    finally:
        CORRECTIONS.clear()
        CORRECTIONS.update(before)
