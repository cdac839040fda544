"""Each file of configs/accelerate that starts several processes, launched with two of them on the CPU.

The recipe trains a model made on the spot. accelerate falls back silently (to one process, or to plain parameters), so
the world size and the type of the factors are asserted. Run by `accelerate launch`, this file is the recipe with a
callback that looks:

    test_recipes_accelerate.py OUT RECIPE_ARGUMENT...
"""

import contextlib
import gc
import importlib.util
import json
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainerCallback

from safemerge_callback import load_adapter, writer_for
from tests.support.ranks import finish, leave, started
from tests.support.world import make_world
from tests.trajectory.engines.cpu_fsdp import allow_fsdp_on_cpu

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "accelerate"
TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"
# What accelerate calls each, and the mark that its engine leaves on a LoRA factor.
EXPECTED = {
    "ddp": ("MULTI_CPU", "Parameter"),
    "fsdp2": ("FSDP", "DTensor"),
    "zero2": ("DEEPSPEED", "fragment"),
    "zero3": ("DEEPSPEED", "partition"),
}
# Launched as on two machines in every test run, and as on one in the slow tests: the file and the engine are the same.
ON_TWO_MACHINES = ("fsdp2", "zero3")


def mark(parameter):
    if hasattr(parameter, "ds_id"):
        return "partition"
    return "fragment" if hasattr(parameter, "_hp_mapping") else type(parameter).__name__


class Look(TrainerCallback):
    """Write down, on each process, where it runs and what the factors are."""

    def __init__(self, out):
        self.out = Path(out)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        live = {n: (f.A.cpu(), f.B.cpu()) for n, f in writer_for(model, optimizer=optimizer).gather().items()}
        torch.save(live, self.out / f"live{torch.distributed.get_rank()}.pt")
        factors = [p for n, p in model.named_parameters() if "lora_" in n]
        found = {
            "world_size": torch.distributed.get_world_size(),
            "marks": sorted({mark(p) for p in factors}),
            "dtypes": sorted({str(p.dtype) for p in factors}),
            "engine": args.distributed_state.distributed_type.name,
            "step": state.global_step,
        }
        self.out.joinpath(f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


def main(out, *arguments):
    """The recipe's own main, with one callback more."""
    allow_fsdp_on_cpu()
    from recipes import finetune

    gc.freeze()  # as tests/support/ranks.py does, and for the same reason
    build = finetune.build_trainer
    finetune.build_trainer = lambda *given: build(*given, callbacks=[Look(out)])
    finetune.main(list(arguments))
    leave()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The training tests' model, subspace and safety adapter, and beside the model a tokenizer with a chat template."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    made = make_world(tmp_path_factory.mktemp("world"))
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "the", "a", "film", "good", "bad"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)
    fast.save_pretrained(made.folder / "aligned")
    return made


def recipe(world, out):
    values = {
        "model_name_or_path": world.folder / "aligned",
        "data": "sentiment",
        "num_examples": 16,
        "output_dir": out,
        "use_peft": "true",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": "q_proj v_proj",
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "learning_rate": "1e-3",
        "max_length": 32,
        "bf16": "false",
        "gradient_checkpointing": "false",
        "use_cpu": "true",
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": "true",
        "safemerge_subspace": world.subspace,
        "safemerge_safety_adapter": world.safety,
        "safemerge_gate": "all",
        "safemerge_every": 2,
    }
    return [word for key, value in values.items() for word in (f"--{key}", *str(value).split(" "))]


def launch(world, out, name, *more, machines=1, processes=2):
    """Launch as on `machines` hosts, which are all this one; return what each process saw."""
    out.mkdir()
    port = str(free_port()) if machines > 1 else "0"
    options = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--num_processes", str(processes)]
    options += ["--main_process_port", port]
    if machines > 1:
        options += ["--num_machines", str(machines), "--main_process_ip", "127.0.0.1"]
        options += ["--deepspeed_multinode_launcher", "standard"] if name.startswith("zero") else []
    arguments = [__file__, str(out), *recipe(world, out), *more]
    with contextlib.ExitStack() as stack:
        hosts = [
            stack.enter_context(started(1, accelerate_launch, *options, "--machine_rank", rank, *arguments))
            for rank in range(machines)
        ]
        finish([launcher for (launcher,) in hosts])
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


def accelerate_launch(*words):
    """The command of that name, which starts new processes: only its own imports are not paid anew."""
    from accelerate.commands import launch as command

    sys.argv = ["accelerate launch", *words]
    command.main()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def needs_its_engine(name):
    if name.startswith("zero") and not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed: pip install -r requirements/engines.txt")


def check(found, out, name, processes=2):
    engine, kind = EXPECTED[name]
    want = {"world_size": processes, "marks": [kind], "dtypes": ["torch.float32"], "engine": engine, "step": 3}
    assert found == [want] * processes
    check_merged_and_saved(out, processes)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ON_TWO_MACHINES else ()) for name in EXPECTED]
)
def test_two_processes_train_and_merge_in_the_engine_that_the_file_names(world, tmp_path, name):
    needs_its_engine(name)
    check(launch(world, tmp_path / name, name), tmp_path / name, name)


@pytest.mark.parametrize("name", ON_TWO_MACHINES)
def test_two_machines_of_one_process_each(world, tmp_path, name):
    """The options that docs/launch.md gives for several machines."""
    needs_its_engine(name)
    check(launch(world, tmp_path / name, name, machines=2), tmp_path / name, name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", EXPECTED)
def test_on_the_gpus_that_are_here_in_bf16(world, tmp_path, name):
    needs_its_engine(name)
    count, out = torch.cuda.device_count(), tmp_path / name
    if name == "ddp" and count == 1:
        pytest.skip("needs two GPUs: accelerate refuses a single process of MULTI_GPU")
    found = launch(world, out, name, "--use_cpu", "false", "--bf16", "true", processes=count)
    assert [(f["world_size"], f["marks"], f["step"]) for f in found] == [(count, [EXPECTED[name][1]], 3)] * count
    check_merged_and_saved(out, count)


def check_merged_and_saved(out, processes):
    """Every process had the same factors after the last merge, and both the adapter and the checkpoint hold them."""
    entries = [json.loads(line) for line in (out / "safemerge.jsonl").read_text().splitlines()]
    assert [e["kind"] for e in entries] == ["start", "check", "merge", "check", "merge", "end"]
    assert [e["step"] for e in entries if e["kind"] == "merge"] == [2, 3]
    live, *others = (torch.load(out / f"live{rank}.pt") for rank in range(processes))
    assert len(live) == 4
    assert all(same(live, other) for other in others)
    for folder in (out, out / "checkpoint-3"):
        saved = load_adapter(folder).factors
        assert same(live, {name: (f.A, f.B) for name, f in saved.items()})
    assert all(B.abs().max() > 1e-3 for _, B in live.values())


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(x, y) for name in left for x, y in zip(left[name], right[name], strict=True)
    )


def test_every_file_for_several_processes_is_launched_above():
    kinds = {path.stem: yaml.safe_load(path.read_text())["distributed_type"] for path in CONFIGS.glob("*.yaml")}
    assert sorted(name for name, kind in kinds.items() if kind != "NO") == sorted(EXPECTED)


if __name__ == "__main__":
    main(*sys.argv[1:])
