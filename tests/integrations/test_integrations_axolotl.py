"""axolotl's plugin against axolotl's own base class and manager, or the signatures that they have in 0.19."""

import inspect

import pytest
from pydantic import ValidationError, create_model

from safemerge_callback import SafeMergeCallback
from safemerge_callback.errors import ConfigError

NAME = "safemerge_callback.integrations.axolotl.SafeMergePlugin"


class BasePlugin:
    def register(self, cfg): ...

    def get_input_args(self): ...

    def add_callbacks_pre_trainer(self, cfg, model):
        return []

    def add_callbacks_post_trainer(self, cfg, trainer):
        return []


class PluginManager:
    """What axolotl 0.19 does with the names under `plugins`."""

    def __init__(self):
        self.plugins = {}

    @classmethod
    def get_instance(cls):
        return cls()

    def register(self, name):
        import importlib

        module, kind = name.rsplit(".", 1)
        self.plugins[name] = getattr(importlib.import_module(module), kind)()

    def get_input_args(self):
        return [plugin.get_input_args() for plugin in self.plugins.values()]

    def add_callbacks_pre_trainer(self, cfg, model):
        return [c for plugin in self.plugins.values() for c in plugin.add_callbacks_pre_trainer(cfg, model)]

    def add_callbacks_post_trainer(self, cfg, trainer):
        return [c for plugin in self.plugins.values() for c in plugin.add_callbacks_post_trainer(cfg, trainer)]


@pytest.fixture
def plugin(integration):
    host = {"BasePlugin": BasePlugin, "PluginManager": PluginManager}
    return integration("axolotl", {"axolotl.integrations.base": host})


@pytest.fixture
def manager(plugin):
    from axolotl.integrations.base import PluginManager

    manager = PluginManager.get_instance()
    manager.register(NAME)
    yield manager
    manager.plugins.pop(NAME)


def test_every_method_takes_what_axolotl_gives(plugin):
    from axolotl.integrations.base import BasePlugin

    assert issubclass(plugin.SafeMergePlugin, BasePlugin)
    ours = [name for name, value in vars(plugin.SafeMergePlugin).items() if inspect.isfunction(value)]
    assert ours == ["register", "get_input_args", "add_callbacks_pre_trainer", "add_callbacks_post_trainer"]
    for name in ours:
        theirs = inspect.signature(getattr(BasePlugin, name)).parameters
        assert list(inspect.signature(getattr(plugin.SafeMergePlugin, name)).parameters) == list(theirs)


def test_the_callback_that_the_manager_gets_trains_and_merges(manager, world, tmp_path, merged_once):
    cfg = {"plugins": [NAME], "safemerge": world.knobs(every=0), "adapter": "lora"}
    for plugin in manager.plugins.values():
        plugin.register(cfg)
    model = world.model()
    callbacks = manager.add_callbacks_pre_trainer(cfg, model)
    assert [type(c) for c in callbacks] == [SafeMergeCallback]
    trainer = world.trainer(tmp_path, *callbacks, model=model)
    assert not list(manager.add_callbacks_post_trainer(cfg, trainer))
    assert callbacks[0].trainer is trainer
    trainer.train()
    merged_once(tmp_path)


def test_the_schema_takes_the_settings_and_refuses_as_they_do(manager, world):
    module, kind = manager.get_input_args()[0].rsplit(".", 1)
    schema = getattr(__import__(module, fromlist=[kind]), kind)
    whole = create_model("AxolotlInputConfig", __base__=(schema,), learning_rate=(float, 1e-4))
    knobs = world.knobs(weights=[0.7, 0.3])
    assert whole(safemerge=knobs).model_dump(exclude_none=True) == {"safemerge": knobs, "learning_rate": 1e-4}
    assert "safemerge" not in whole().model_dump(exclude_none=True)
    with pytest.raises(ValidationError, match="setting 'treshold' is unknown; did you mean 'threshold'"):
        whole(safemerge={**knobs, "treshold": 0.4})


@pytest.mark.parametrize("settings", [None, {}, "safemerge.yaml"])
def test_a_plugin_without_settings_is_refused_before_a_model_is_loaded(manager, settings):
    with pytest.raises(ConfigError, match=r"key 'safemerge' of the axolotl YAML is .*take SafeMergePlugin out"):
        manager.plugins[NAME].register({"plugins": [NAME], "safemerge": settings})
