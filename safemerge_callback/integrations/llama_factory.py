"""LLaMA-Factory's training with the callback, from keys `safemerge_...` in LLaMA-Factory's YAML.

    python -m safemerge_callback.integrations.llama_factory llama2_lora_sft.yaml safemerge_every=25

It stands for `llamafactory-cli train`, which has no place for a callback. Source: hiyouga/LLaMA-Factory,
src/llamafactory/train/tuner.py (run_exp) and src/llamafactory/hparams/parser.py (read_args), as of 0.9.5.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from ..training import SafeMergeCallback, SafeMergeConfig
from . import split_settings

PREFIX = "safemerge_"


def take_settings(args: Any) -> tuple[SafeMergeConfig, dict[str, Any]]:
    """Return the callback's settings and the arguments that are LLaMA-Factory's own.

    Raises ConfigError where `args` are not those of a YAML file, hold no `safemerge_` key, or one that is refused.
    """
    if not isinstance(args, dict):
        raise ConfigError(f"arguments are {args!r}: give a YAML file first, then overrides such as {PREFIX}every=25")
    ours, theirs = split_settings(args, PREFIX)
    if not ours:
        raise ConfigError(
            f"the YAML has no key that begins with {PREFIX!r}: give at least {PREFIX}subspace, or train without the "
            "callback by `llamafactory-cli train`"
        )
    return SafeMergeConfig.from_dict(ours), theirs


def main() -> None:
    """Train as the YAML file and the overrides on the command line say."""
    from llamafactory.hparams import read_args
    from llamafactory.train.tuner import run_exp

    config, args = take_settings(read_args())
    run_exp(args=args, callbacks=[SafeMergeCallback(config)])


if __name__ == "__main__":
    main()
