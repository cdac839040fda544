"""Bases of the trainers' matrix, made once a session."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest

from benchmarks.trainers.world import make_base


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base(family):
        if family not in made:
            made[family] = make_base(folder / family, family)
        return made[family]

    return base
