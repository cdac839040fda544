"""What importing costs, and what the pages say."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from safemerge_callback import SafeMergeConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "integrations").glob("*.md"))


def test_the_package_of_integrations_loads_no_host_and_no_torch():
    code = (
        "import sys, safemerge_callback.integrations as i; print(i.split_settings({'a_b': 1, 'c': 2}, 'a_'));"
        "assert not {'torch', 'transformers', 'axolotl', 'swift', 'llamafactory'} & set(sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.strip() == "({'b': 1}, {'c': 2})"


def settings(block):
    """The callback's settings in a YAML block of a page, however its host spells them."""
    found = dict(block.get("safemerge", {}))
    for key, value in (block | block.get("ENV", {})).items():
        if key.lower().startswith("safemerge_"):
            found[key.lower().removeprefix("safemerge_")] = value
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_is_short_and_its_yaml_is_accepted(page):
    text = page.read_text()
    assert (ROOT / "safemerge_callback" / "integrations" / f"{page.stem}.py").is_file()
    blocks = [yaml.safe_load(part.split("```")[0]) for part in text.split("```yaml\n")[1:]]
    (found,) = [settings(block) for block in blocks]
    config = SafeMergeConfig.from_dict(found)
    assert config.subspace
    assert found.keys() <= {f.name for f in fields(SafeMergeConfig)}
    outside = [line for part in text.split("```")[::2] for line in part.splitlines() if line.strip()]
    assert len(outside) <= 10


def test_every_integration_has_a_page():
    modules = {p.stem for p in (ROOT / "safemerge_callback" / "integrations").glob("*.py")} - {"__init__"}
    assert {p.stem for p in PAGES} == modules
