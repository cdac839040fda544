"""LLaMA-Factory's run_exp and read_args, or functions of the signatures that they have in 0.9.5."""

import inspect
import sys
from pathlib import Path

import pytest
import yaml

from safemerge_callback import SafeMergeCallback
from safemerge_callback.errors import ConfigError


def read_args(args=None):
    """The YAML file that the command line names, with overrides such as `safemerge_every=0`."""
    file, *overrides = sys.argv[1:]
    if not file.endswith(".yaml"):
        return [file, *overrides]
    found = yaml.safe_load(Path(file).read_text())
    return found | {key: yaml.safe_load(value) for key, value in (o.split("=", 1) for o in overrides)}


def run_exp(args=None, callbacks=None): ...


@pytest.fixture
def shim(integration):
    host = {"llamafactory.hparams": {"read_args": read_args}, "llamafactory.train.tuner": {"run_exp": run_exp}}
    return integration("llama_factory", host)


@pytest.fixture
def command(shim, monkeypatch, tmp_path):
    """Run the shim on a YAML file and overrides; return what run_exp was called with, checked against its signature."""
    import llamafactory.train.tuner as tuner

    calls, signature = [], inspect.signature(tuner.run_exp)

    def call(values, *overrides):
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(values))
        monkeypatch.setattr(sys, "argv", ["shim", str(path), *overrides])
        monkeypatch.setattr(tuner, "run_exp", lambda *a, **k: calls.append(signature.bind(*a, **k).arguments))
        shim.main()
        return calls.pop()

    return call


def test_run_exp_gets_its_own_keys_and_the_callback_that_trains_and_merges(command, world, tmp_path, merged_once):
    ours = {f"safemerge_{key}": value for key, value in world.knobs(weights=[0.7, 0.3]).items()}
    theirs = {"stage": "sft", "finetuning_type": "lora", "lora_rank": 8}
    given = command({**theirs, **ours}, "safemerge_every=0", "lora_rank=4")
    assert given["args"] == {**theirs, "lora_rank": 4}
    (callback,) = given["callbacks"]
    assert type(callback) is SafeMergeCallback
    assert callback.config.weights == [0.7, 0.3]
    world.trainer(tmp_path / "run", callback).train()
    merged_once(tmp_path / "run")


def test_no_settings_and_what_is_refused(command, shim, monkeypatch):
    with pytest.raises(ConfigError, match=r"no key that begins with 'safemerge_'.*llamafactory-cli train"):
        command({"stage": "sft"})
    with pytest.raises(ConfigError, match="'treshold' is unknown; did you mean 'threshold'"):
        command({"safemerge_subspace": "s", "safemerge_treshold": 0.4})
    monkeypatch.setattr(sys, "argv", ["shim", "--stage", "sft"])
    with pytest.raises(ConfigError, match=r"arguments are \['--stage', 'sft'\]: give a YAML file first"):
        shim.main()
