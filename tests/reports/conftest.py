"""A made-up run, written through the real journal, and a real browser to look at its page with."""

import os
import shutil

import pytest

from recipes.example_run import write_example


@pytest.fixture(scope="session")
def example(tmp_path_factory):
    """A journal of 4 layers x 7 module types and 12 checks, with merges and probes; not to be changed."""
    return write_example(tmp_path_factory.mktemp("example") / "run", layers=4, checks=12)


def _chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


# One browser a module, not a session: playwright keeps an event loop running, which other tests' asyncio would meet.
@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = _chromium()
    if path is None:
        pytest.skip("no Chromium is installed (apt-get install chromium, or set CHROMIUM to its path)")
    with playwright.sync_playwright() as driver:
        # Without its sandbox, as playwright does unless asked: containers lack what that needs, and the pages are ours.
        arguments = ["--disable-gpu", "--disable-dev-shm-usage"]
        opened = driver.chromium.launch(executable_path=path, args=arguments, chromium_sandbox=False, timeout=120_000)
        yield opened
        opened.close()
