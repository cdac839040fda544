from dataclasses import fields
from os import PathLike
from typing import get_args, get_type_hints

import pytest
from transformers import TrainerCallback

from safemerge_callback.errors import ConfigError
from safemerge_callback.training import SafeMergeCallback, SafeMergeConfig
from safemerge_callback.training.config.keywords import Settings

ALIASES = ("preset", "combination_type")


class Sections(TrainerCallback):
    """Keeps what a model card would say after each step."""

    def __init__(self, guard):
        self.guard, self.text = guard, ""

    def on_step_end(self, args, state, control, **kwargs):
        self.text = self.guard.session.section().text


def plain(kind):
    """The types that a setting may have, without those that a file cannot hold."""
    parts = set(get_args(kind) or (kind,))
    return {getattr(part, "__origin__", part) for part in parts} - {PathLike[str], PathLike}


def test_the_keywords_that_an_editor_knows_are_the_settings():
    typed, held = get_type_hints(Settings), get_type_hints(SafeMergeConfig)
    assert list(typed) == [*ALIASES, *(f.name for f in fields(SafeMergeConfig))]
    names = {"list": "Sequence", "dict": "Mapping"}
    for name, kind in held.items():
        wanted = {names.get(part.__name__, part.__name__) for part in plain(kind)}
        assert wanted == {part.__name__ for part in plain(typed[name])}, name


def test_a_bare_path_is_the_subspaces(tmp_path):
    path = tmp_path / "s.safetensors"
    for given in (path, str(path)):
        assert SafeMergeCallback(given).config == SafeMergeConfig(subspace=str(path))
    assert SafeMergeCallback(path, gate="watch").config.gate == "watch"
    with pytest.raises(ConfigError, match="subspace was given twice, 'a' and 'b': give one"):
        SafeMergeCallback("a", subspace="b")
    with pytest.raises(ConfigError, match="config is a int: give"):
        SafeMergeCallback(3)
    with pytest.raises(ConfigError, match=r"config is a str: give .*from_yaml"):
        SafeMergeCallback("guard.yaml")


def test_a_card_has_the_settings_that_were_chosen_and_no_path(world, tmp_path):
    guard = world.guard(every=3, journal=str(tmp_path / "own.jsonl"))
    assert guard.config.words == "method linear, weights [0.8, 0.2], every 3"
    assert str(tmp_path) not in guard.config.words
    assert world.subspace not in guard.config.words
    trainer = world.trainer(tmp_path / "out", guard, save_strategy="steps", save_steps=3)
    trainer.add_callback(kept := Sections(guard))
    trainer.train()
    assert "| settings | method linear, weights \\[0.8, 0.2\\], every 3 |" in kept.text


def test_a_guard_shows_what_was_chosen_and_in_a_notebook_escapes_it():
    guard = SafeMergeCallback("<i>s</i>", every=50)
    assert eval(repr(guard), {"SafeMergeCallback": SafeMergeCallback}).config == guard.config
    assert repr(guard) == (
        "SafeMergeCallback(subspace='<i>s</i>', method='pull', weights=[0.8, 0.2], strength=0.2, every=50)"
    )
    shown = guard._repr_html_()
    assert "<i>" not in shown
    assert "&lt;i&gt;s&lt;/i&gt;" in shown
    assert "threshold" not in shown
