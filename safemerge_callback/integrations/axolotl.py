"""axolotl's plugin: the callback, from the mapping `safemerge` in axolotl's YAML.

    plugins: [safemerge_callback.integrations.axolotl.SafeMergePlugin]
    safemerge: {subspace: llama-2-7b.subspace.safetensors, safety_adapter: my-org/llama-2-7b-safety-lora}

Source: axolotl-ai-cloud/axolotl, src/axolotl/integrations/base.py (BasePlugin, PluginManager) and config.py there
(merge_input_args), as of 0.19.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from ..errors import ConfigError
from ..training import SafeMergeCallback, SafeMergeConfig

if TYPE_CHECKING:
    from torch import nn


class SafeMergeArgs(BaseModel):
    """The key that this plugin adds to axolotl's schema: every setting of SafeMergeConfig, by its own name."""

    safemerge: dict[str, Any] | None = None

    @field_validator("safemerge")
    @classmethod
    def refuse(cls, settings: dict[str, Any] | None) -> dict[str, Any] | None:
        """Raise what SafeMergeConfig raises, so that axolotl reports it with its own settings' faults."""
        if settings is not None:
            SafeMergeConfig.from_dict(settings)
        return settings


class SafeMergePlugin(BasePlugin):
    """Adds one SafeMergeCallback to axolotl's trainer; ConfigError where the YAML has no settings for it."""

    def register(self, cfg: dict[str, Any]) -> None:
        """Refuse a YAML that names the plugin and gives it nothing to do, before a model is loaded."""
        config_of(cfg)

    def get_input_args(self) -> str:
        """Return where axolotl finds the schema of the key `safemerge`."""
        return f"{SafeMergeArgs.__module__}.{SafeMergeArgs.__qualname__}"

    def add_callbacks_pre_trainer(self, cfg: dict[str, Any], model: nn.Module) -> list[SafeMergeCallback]:
        """Return the callback; nothing is opened or loaded before training begins."""
        return [SafeMergeCallback(config_of(cfg))]

    def add_callbacks_post_trainer(self, cfg: dict[str, Any], trainer: Any) -> list[SafeMergeCallback]:
        """Let the callback know its trainer, which a gradient term needs under DeepSpeed; no callback more."""
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, SafeMergeCallback):
                callback.attach(trainer)
        return []


def config_of(cfg: dict[str, Any]) -> SafeMergeConfig:
    """Return the settings in axolotl's configuration; ConfigError for none, and for one that is refused."""
    settings = cfg.get("safemerge")
    if not isinstance(settings, dict) or not settings:
        raise ConfigError(
            f"key 'safemerge' of the axolotl YAML is {settings!r}: map settings to values under it (at least "
            "`subspace`), or take SafeMergePlugin out of `plugins`"
        )
    return SafeMergeConfig.from_dict(settings)
