"""The wheel alone: of this project an empty environment sees its files and no others, and the command works there."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "safemerge_callback"
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "MANIFEST.in")
pytestmark = pytest.mark.slow


# Without this clone on Python's path, where pip would take what a build left in it for an installed package.
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def said(*command, env=OUTSIDE, **more):
    """What a command prints that ends well."""
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, **more)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built of a copy of what it is made of, so that no build leaves anything in the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(PACKAGE, folder / "source" / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, folder / "source")
    how = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--wheel-dir", folder)
    said(sys.executable, "-m", "pip", "wheel", *how, folder / "source", cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """A function that runs a program of an environment with this wheel, and with the libraries of the present one.

    Those are put on its path by a .pth file: what is installed there by such a file itself, as this clone is, is not.
    """
    folder = tmp_path_factory.mktemp("environment")
    said(sys.executable, "-m", "venv", "--without-pip", folder)
    bin = folder / "bin"
    how = ("install", "--no-deps", "--no-index", "--disable-pip-version-check", wheel)
    said(sys.executable, "-m", "pip", "--python", bin / "python", *how, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    environment = {"PATH": str(bin), "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return lambda program, *words: said(bin / program, *words, cwd=folder, env=environment)


def test_the_wheel_holds_all_files_of_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    there = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert names == {name for name in there if "__pycache__" not in name}


def test_of_this_project_only_the_wheel_is_seen(command):
    code = (
        "import importlib.metadata as m, importlib.util as u, safemerge_callback as s;"
        "print(s.__file__, m.version('safemerge-callback') == s.__version__,"
        " [n for n in ('recipes', 'tests', 'benchmarks', 'method_comparison') if u.find_spec(n)])"
    )
    place, same, others = command("python", "-c", code).strip().split(" ", 2)
    assert Path(place).parent.parent.name == "site-packages"
    assert not Path(place).is_relative_to(ROOT)
    assert not Path(place).is_relative_to(sysconfig.get_path("purelib"))
    assert (same, others) == ("True", "[]")


def test_help_a_measure_and_a_report_work(command, world, tmp_path):
    from safemerge_callback import __version__

    assert command("safemerge", "--version") == f"safemerge {__version__}\n"
    assert "merge" in command("safemerge", "--help")
    measured = json.loads(command("safemerge", "measure", world.safety, "-s", world.subspace, "--json"))
    assert len(measured["modules"]) == 4
    assert all(0 <= module["cosine"] <= 1 for module in measured["modules"])
    shutil.copy(ROOT / "tests" / "record" / "journals" / "v2.jsonl", tmp_path / "safemerge.jsonl")
    command("safemerge", "report", tmp_path)
    page = (tmp_path / "safemerge_report.html").read_text(encoding="utf-8")
    assert "layers.0.self_attn.q_proj" in page
    assert "<script" in page
