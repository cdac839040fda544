"""Recipes end as the verbs of `safemerge` do: what is refused is one line, and no traceback."""

import re
from pathlib import Path

import pytest

from recipes.command import run_command
from safemerge_callback.errors import AdapterError, ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", [ConfigError, AdapterError])
def test_what_is_refused_is_one_line(capsys, kind):
    def main():
        raise kind("setting 'a\x1b' is unknown")

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "safemerge: setting 'a\\x1b' is unknown\n")


def test_what_is_none_of_ours_goes_on_and_a_good_end_is_one():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)
    run_command(lambda: None)


def test_every_command_of_the_recipes_and_of_the_study_ends_so():
    for folder in ("recipes", "method_comparison"):
        for path in (ROOT / folder).glob("*.py"):
            ends = re.findall(r'^if __name__ == "__main__":\n    (.*)$', path.read_text(), flags=re.M)
            assert all(end.startswith(("run_command(main)", "run_renamed(")) for end in ends), path
