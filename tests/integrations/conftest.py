"""The hosts: their real modules where they are installed, else modules of the documented signatures in their place."""

import importlib
import importlib.util
import sys
import types

import pytest


def installed(name):
    """Whether a module is there, be it broken: then its own error shows, and no stand-in hides it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if not name.startswith(str(error.name)):
            raise
        return False


@pytest.fixture
def integration(monkeypatch):
    """Import an integration with its host: the real one, else modules of the given names and attributes."""
    loaded = []

    def load(name, host):
        if not all(installed(module) for module in host):
            for module, attributes in host.items():
                path = module.split(".")
                for depth in range(1, len(path) + 1):
                    part = ".".join(path[:depth])
                    monkeypatch.setitem(sys.modules, part, sys.modules.get(part, types.ModuleType(part)))
                vars(sys.modules[module]).update(attributes)
        loaded.append(f"safemerge_callback.integrations.{name}")
        return importlib.import_module(loaded[-1])

    yield load
    for name in loaded:
        sys.modules.pop(name, None)


@pytest.fixture
def merged_once(runs):
    """Assert that the run in a folder checked and merged all four modules at its only check, the last."""

    def check(folder):
        assert [e["kind"] for e in runs.entries(folder)] == ["start", "check", "merge", "end"]
        (merge,) = runs.entries(folder, "merge")
        assert len(merge["modules"]) == 4

    return check
