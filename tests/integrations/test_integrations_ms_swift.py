"""ms-swift's registry of callbacks, or one of the form that it has in 4.6."""

import inspect

import pytest
import yaml

from safemerge_callback import SafeMergeCallback
from safemerge_callback.errors import ConfigError


class TrainerCallback:
    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer


@pytest.fixture
def plugin(integration):
    host = {"callbacks_map": {"early_stop": TrainerCallback}, "TrainerCallback": TrainerCallback}
    plugin = integration("ms_swift", {"swift.callbacks": host})
    from swift.callbacks import callbacks_map

    yield plugin
    callbacks_map.pop("safemerge", None)


@pytest.fixture
def environ(monkeypatch):
    """Set variables as ms-swift sets those under `ENV` of a YAML file: by str()."""

    def place(text):
        for name, value in yaml.safe_load(text)["ENV"].items():
            monkeypatch.setenv(name, str(value))

    return place


def test_it_is_called_as_the_registered_classes_are(plugin):
    from swift.callbacks import TrainerCallback, callbacks_map

    assert "early_stop" in callbacks_map
    plugin.register()
    theirs = list(inspect.signature(TrainerCallback).parameters)
    assert theirs == ["args", "trainer"]
    assert len(inspect.signature(callbacks_map["safemerge"]).parameters) == len(theirs)


def test_the_registered_callback_trains_and_merges(plugin, world, tmp_path, environ, merged_once):
    from swift.callbacks import callbacks_map

    plugin.register()
    environ(f"ENV: {{SAFEMERGE_SUBSPACE: {world.subspace}, SAFEMERGE_SAFETY_ADAPTER: {world.safety}}}")
    environ("ENV: {SAFEMERGE_GATE: all, SAFEMERGE_EVERY: 0, SAFEMERGE_WEIGHTS: [0.7, 0.3]}")
    callback = callbacks_map["safemerge"](world.settings(tmp_path), None)
    assert type(callback) is SafeMergeCallback
    assert (callback.config.weights, callback.config.every) == ([0.7, 0.3], 0)
    world.trainer(tmp_path, callback).train()
    merged_once(tmp_path)


def test_the_callback_knows_the_trainer_that_is_being_made(plugin, world, tmp_path, environ):
    """ms-swift makes its callbacks before the trainer of transformers has been set up."""
    from transformers import Trainer

    environ(f"ENV: {{SAFEMERGE_SUBSPACE: {world.subspace}, SAFEMERGE_SAFETY_ADAPTER: {world.safety}}}")

    class SwiftMixin(Trainer):
        def __init__(self, model, args, **more):
            super().__init__(model, args, callbacks=[plugin.make_callback(args, self)], **more)

    trainer = SwiftMixin(world.model(), world.settings(tmp_path))
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, SafeMergeCallback)]
    assert callback.trainer is trainer


def test_values_are_read_as_in_yaml(plugin):
    found = plugin.config_of(
        {
            "SAFEMERGE_SUBSPACE": "s.safetensors",
            "SAFEMERGE_SAFETY_ADAPTER": "my-org/safety",
            "SAFEMERGE_AT_TRAIN_END": "True",
            "SAFEMERGE_GATE": "threshold",
            "SAFEMERGE_THRESHOLD": "0.4",
            "SAFEMERGE_UNTIL_STEP": "null",
            "SAFEMERGE_CACHE": "/where/harvests/are",
            "HOME": "/root",
        }
    )
    assert (found.at_train_end, found.threshold, found.until_step) == (True, 0.4, None)


def test_nothing_set_and_what_is_refused(plugin):
    with pytest.raises(ConfigError, match=r"no settings: set SAFEMERGE_SUBSPACE .*take 'safemerge' out"):
        plugin.make_callback(None, None)
    with pytest.raises(ConfigError, match="'treshold' is unknown; did you mean 'threshold'"):
        plugin.config_of({"SAFEMERGE_SUBSPACE": "s", "SAFEMERGE_TRESHOLD": "0.4"})
    with pytest.raises(ConfigError, match=r"variable SAFEMERGE_WEIGHTS, '\[0.8', is no YAML"):
        plugin.config_of({"SAFEMERGE_SUBSPACE": "s", "SAFEMERGE_WEIGHTS": "[0.8"})


def test_another_registry_can_be_given(plugin):
    registry = {}
    plugin.register(registry)
    assert registry == {"safemerge": plugin.make_callback}
