"""The command line, in this process and once as a real one."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from safemerge_callback import __version__, load_adapter
from safemerge_callback.cli import app
from safemerge_callback.cli.options import align_of, targets
from safemerge_callback.offline import measure_adapter
from safemerge_callback.record import read_journal
from safemerge_callback.subspace import Subspace


def save_lora(make, folder, seed, **lora):
    from peft import LoraConfig, get_peft_model

    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **lora}
    model = get_peft_model(make(seed=1), LoraConfig(**config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)


@pytest.fixture
def world(tmp_path, tiny_llama, monkeypatch):
    """The working folder holds two checkpoints and two adapters."""
    aligned, unaligned = tiny_llama(seed=1), tiny_llama(seed=1)
    with torch.no_grad():
        for parameter in unaligned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    aligned.save_pretrained(tmp_path / "aligned")
    unaligned.save_pretrained(tmp_path / "unaligned")
    save_lora(tiny_llama, tmp_path / "task", 5)
    save_lora(tiny_llama, tmp_path / "safety", 6)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def build(*more):
    return run("build", "--aligned", "aligned", "--unaligned", "unaligned", "-o", "s.safetensors", *more)


def test_build_describe_measure_merge_report(world):
    assert "14 modules" in build().stdout
    described = run("describe", "s.safetensors", "--verify").stdout
    assert re.search(r"checksums: all \d+ tensors are as they were written", described)
    assert "layers.1.mlp.down_proj" in described
    assert "aligned:   aligned" in described
    readings = measure_adapter("task", "s.safetensors")
    cosines = sorted(reading.cosine for reading in readings.values())
    threshold = (cosines[1] + cosines[2]) / 2
    shown = run("measure", "task", "-s", "s.safetensors", "--threshold", threshold).stdout
    assert "4 modules measured" in shown
    assert "2 of 4 modules below" in shown
    merging = ["merge", "task", "safety", "--subspace", "s.safetensors", "-o", "out"]
    merged = run(*merging, "--threshold", threshold, "--weights", 0.6, 0.4).stdout
    assert "2 of 4 modules to merge" in merged
    assert "out: 2 of 4 modules merged" in merged
    journal = read_journal("out/safemerge.jsonl")
    assert [entry["kind"] for entry in journal] == ["start", "check", "merge", "end"]
    assert journal[2]["weights"] == [0.6, 0.4]
    assert {m["name"] for m in journal[2]["modules"]} == set(readings.below(threshold))
    reported = run("report", "out", "-o", "drift.png").stdout
    assert "2 merges in 2 modules" in reported
    assert (world / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert "out/safemerge_report.html" in run("report", "out/safemerge.jsonl").stdout
    assert "layers.1.self_attn.q_proj" in (world / "out" / "safemerge_report.html").read_text()
    run("report", "out", "-o", "curves.svg", "--plot", "trajectories")
    assert "a page holds them all" in run("report", "out", "--plot", "weights", code=2).stderr
    assert "2 merges in 2 modules" in run("watch", "out", "--once").stdout
    assert "leave out --once" in run("watch", "nowhere", "--once", code=2).stderr


def test_describe_as_json_and_verify(world):
    build()
    told = json.loads(run("describe", "s.safetensors", "--json", "--verify").stdout)
    assert len(told["modules"]) == 14
    data = bytearray((world / "s.safetensors").read_bytes())
    data[-5000] ^= 1
    (world / "s.safetensors").write_bytes(bytes(data))
    assert "was changed: 1 of" in run("describe", "s.safetensors", "--verify", code=2).stderr


def test_merge_on_a_compressed_file_decides_as_on_the_exact_one(world):
    build()
    assert "14 modules" in run("compress", "s.safetensors", "-o", "s8.safetensors").stdout
    assert "int8" in run("describe", "s8.safetensors").stdout
    cosines = sorted(reading.cosine for reading in measure_adapter("task", "s.safetensors").values())
    gate = ["--threshold", (cosines[1] + cosines[2]) / 2]
    for file in ("s.safetensors", "s8.safetensors"):
        run("merge", "task", "safety", "--subspace", file, "-o", f"out_{file[:2]}", *gate)
    exact, small = (
        {m["name"]: m["merge"] for m in read_journal(f"out_{name}/safemerge.jsonl")[1]["modules"]}
        for name in ("s.", "s8")
    )
    assert exact == small
    assert sum(exact.values()) == 2


def test_vocabularies_of_other_sizes_only_when_asked(world, tiny_llama):
    tiny_llama(seed=2, vocab_size=80).save_pretrained(world / "unaligned")
    chosen = ["--target-modules", "embed_tokens,q_proj"]
    refused = run("build", "--aligned", "aligned", "--unaligned", "unaligned", "-o", "s", *chosen, code=2).stderr
    assert "--common-rows" in refused
    assert "3 modules" in build(*chosen, "--common-rows").stdout


def test_measure_as_json(world):
    build()
    answer = json.loads(run("measure", "task", "-s", "s.safetensors", "--json", "--threshold", 0.99).stdout)
    readings = measure_adapter("task", "s.safetensors")
    assert {m["name"]: m["cosine"] for m in answer["modules"]} == {n: r.cosine for n, r in readings.items()}
    assert answer["below"] == readings.below(0.99)
    assert set(json.loads(run("measure", "task", "-s", "s.safetensors", "--json").stdout)) == {
        "moved_mean",
        "moved_edge",
        "modules",
    }


def test_build_from_an_adapter_and_by_targets(world):
    run("build", "--adapter", "safety", "-o", "a.safetensors", "--no-progress")
    assert {module.kind for module in Subspace.load("a.safetensors").modules.values()} == {"factor"}
    build("--target-modules", "q_proj,down_proj")
    assert {name.split(".")[-1] for name in Subspace.load("s.safetensors").modules} == {"q_proj", "down_proj"}
    build("--target-modules", r".*\.0\..*_proj")
    assert {name.split(".")[1] for name in Subspace.load("s.safetensors").modules} == {"0"}


def test_targets_are_names_or_a_pattern():
    assert targets(None) is None
    assert targets("q_proj") == ["q_proj"]
    assert targets("q_proj, layers.0.v_proj") == ["q_proj", "layers.0.v_proj"]
    assert targets("q_proj|v_proj") == "q_proj|v_proj"
    assert targets(r".*\d{1,2}.*") == r".*\d{1,2}.*"


def test_bake_with_more_of_the_alignment_vector(world):
    build()
    out = run("bake", "task", "--base", "aligned", "--align", "1.1", "-s", "s.safetensors", "-o", "full").stdout
    assert "full: a full checkpoint" in out
    run("bake", "--base", "aligned", "--align", "v_proj=1.5", "--align-rank", 2, "-s", "s.safetensors", "-o", "start")
    assert (world / "start" / "config.json").exists()
    assert "1.1 of the alignment vector" in (world / "full" / "README.md").read_text()
    assert align_of("v_proj=1.2, o_proj=1") == {"v_proj": 1.2, "o_proj": 1.0}
    assert align_of(None) == 1.0


@pytest.mark.filterwarnings("default:safemerge. nothing was merged")
def test_methods_and_gates(world):
    build()
    base = ["merge", "task", "safety", "-s", "s.safetensors"]
    run(*base, "--num-layers", 3, "-o", "three")
    assert read_journal("three/safemerge.jsonl")[1]["gate"] == "num_layers"
    assert len(read_journal("three/safemerge.jsonl")[2]["modules"]) == 3
    for knob, gate in {"quantile": 0.5, "z-threshold": -1, "reference-fraction": 0.75}.items():
        run(*base, f"--{knob}", gate, "-o", knob, "--allow-empty")
        assert read_journal(f"{knob}/safemerge.jsonl")[1][knob.replace("-", "_")] == gate
    run(*base, "--gate", "random", "--num-layers", 2, "--seed", 7, "-o", "lot")
    assert "2 of 4 by lot" in read_journal("lot/safemerge.jsonl")[1]["modules"][0]["reason"]
    run(*base, "--gate", "gap", "-o", "gap")
    run(*base, "--threshold", 1, "--soft", "-o", "soft")
    assert all(len(m["weights"]) == 2 for m in read_journal("soft/safemerge.jsonl")[2]["modules"])
    run(*base, "--gate", "all", "--method", "cat", "-o", "cat")
    assert json.loads((world / "cat" / "adapter_config.json").read_text())["r"] == 8
    run(*base, "--gate", "all", "--space", "factor", "-o", "factor")
    run("merge", "task", "-s", "s.safetensors", "--gate", "all", "--method", "project", "-o", "project")
    run(*base, "--gate", "all", "-o", "project", code=2)
    run(*base, "--gate", "all", "-o", "project", "--overwrite")


def test_the_plain_call_merges_every_module_and_without_an_adapter_pulls(world):
    build()
    assert "4 of 4 modules merged" in run("merge", "task", "safety", "-s", "s.safetensors", "-o", "both").stdout
    config = read_journal("both/safemerge.jsonl")[0]["config"]
    assert (config["gate"], config["method"], config["weights"]) == ("all", "linear", [0.8, 0.2])
    run("merge", "task", "-s", "s.safetensors", "-o", "pulled")
    before, after = (load_adapter(name).factors for name in ("task", "pulled"))
    for name, old in before.items():
        assert torch.allclose(after[name].B @ after[name].A, 0.8 * old.B @ old.A, atol=1e-6), name
    assert read_journal("pulled/safemerge.jsonl")[0]["config"]["method"] == "pull"
    assert "method: pull" in (world / "pulled" / "safemerge.yaml").read_text()
    run("merge", "--config", "pulled/safemerge.yaml", "-o", "again")
    weights = "adapter_model.safetensors"
    assert (world / "again" / weights).read_bytes() == (world / "pulled" / weights).read_bytes()


@pytest.mark.filterwarnings("default:safemerge. nothing was merged")
@pytest.mark.parametrize("knobs", [("--threshold", 0.01), ("--gate", "opposed", "--z-threshold", -1e6)])
def test_a_merge_of_nothing_is_no_success(world, knobs):
    build()
    base = ["merge", "task", "safety", "-s", "s.safetensors", *knobs]
    empty = run(*base, "-o", "out", code=1)
    assert "out: 0 of 4 modules merged" in empty.stdout
    assert "note: nothing was merged: gate " in empty.stderr
    assert "selects none of 4 modules. The closest is 'layers." in empty.stderr
    allowed = run(*base, "-o", "out", "--force", "--allow-empty")
    assert "note: nothing was merged" in allowed.stderr
    (world / "merge.yaml").write_text("allow_empty: true\n")
    run(*base, "-o", "out", "--force", "--config", "merge.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["describe", "nowhere"], "no such file"),
        (["describe", "task/adapter_model.safetensors"], "not a safety-subspace file"),
        (["build", "-o", "x", "--aligned", "aligned"], "unaligned not given"),
        (["build", "-o", "x", "--aligned", "aligned", "--unaligned", "aligned", "--no-progress"], "equal at all"),
        (["measure", "nowhere/at/all", "-s", "s.safetensors"], "no such folder"),
        (["measure", "task", "-s", "s.safetensors", "--threshold", "7"], "threshold=7"),
        (["measure", "task", "-s", "s.safetensors", "--device", "warp"], "device 'warp' cannot be used"),
        (["merge", "task", "safety", "-s", "s.safetensors", "-o", "x", "--method", "linaer"], "did you mean 'linear'"),
        (["merge", "task", "safety", "-s", "s.safetensors", "-o", "x", "--gate", "watch"], "merges nothing"),
        (["merge", "task", "safety", "-s", "s.safetensors", "-o", "x", "--weights", "3", "0"], "weights=[3.0, 0.0]"),
        (["merge", "task", "-s", "s.safetensors", "-o", "x", "--method", "linear"], "needs a safety adapter"),
        (["merge", "task", "safety", "-s", "s.safetensors", "-o", "x", "--quantile", "3"], "quantile=3"),
        (["merge", "task", "safety", "-s", "s.safetensors", "-o", "x", "--gate", "gap", "--soft"], "soft=True"),
        (
            ["merge", "task", "-s", "s.safetensors", "-o", "x", "--method", "project", "--gate", "reference"],
            "gate 'reference' needs a safety adapter",
        ),
        (["merge", "task", "safety", "-s", "s.safetensors", "-o", "task"], "one of the inputs"),
        (["bake", "task", "--base", "aligned", "-o", "x", "--align", "1.1"], "without a subspace"),
        (["bake", "task", "--base", "aligned", "-o", "x", "--align", "v_proj=much"], "'much' is no number"),
        (["report", "task"], "holds no safemerge.jsonl"),
        (["report", "task/README.md"], "line 1: not JSON"),
    ],
)
def test_errors_are_one_message_and_leave_nothing(world, arguments, message):
    build()
    before = sorted(world.rglob("*"))
    result = run(*arguments, code=2)
    assert message in result.stderr
    assert result.stderr.startswith("safemerge: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert sorted(world.rglob("*")) == before


def test_wrong_usage_is_refused():
    assert "Usage" in run("measure", code=2).stderr
    assert "No such option" in run("measure", "x", "-s", "y", "--treshold", "1", code=2).stderr


def test_version():
    assert run("--version").stdout == f"safemerge {__version__}\n"


def test_help_loads_neither_torch_nor_rich():
    code = """
import sys
from typer.testing import CliRunner
from safemerge_callback.cli import app
for words in (["--help"], ["merge", "--help"]):
    assert CliRunner().invoke(app, words).exit_code == 0
assert not {"torch", "transformers", "rich", "matplotlib", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_as_a_real_process(world):
    """Exit code, both streams, and warnings as notes."""
    build()
    config = json.loads((world / "safety" / "adapter_config.json").read_text())
    (world / "safety" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "org/other"})
    )
    command = [sys.executable, "-m", "safemerge_callback.cli", "merge", "task", "safety", "-s", "s.safetensors"]
    done = subprocess.run([*command, "--gate", "all", "-o", "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out: 4 of 4 modules merged" in done.stdout
    assert done.stderr.startswith("note: base models have different names")
    assert done.stderr.count("\n") == 1
    # By the package's own name it is the same command.
    command[2] = "safemerge_callback"
    refused = subprocess.run([*command, "--gate", "all", "-o", "out"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith("safemerge: output 'out' is not empty")
    assert refused.stderr.count("\n") == 1


def test_the_shell_completes_verbs_and_options():
    words = {"_SAFEMERGE_COMPLETE": "complete_bash", "COMP_WORDS": "safemerge gate --min-re", "COMP_CWORD": "2"}
    command = [sys.executable, "-m", "safemerge_callback"]
    done = subprocess.run(command, env={**os.environ, **words}, capture_output=True, text=True)
    assert done.stdout.split() == ["--min-refused"], done.stderr


def test_the_installed_command_is_this_one():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="safemerge")
    assert entry.value == "safemerge_callback.cli:main"


VERBS = sorted(one.name or getattr(one.callback, "__name__", "") for one in app.registered_commands)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_how_it_is_called_and_its_examples_are_calls(verb):
    shown = run(verb, "--help").output
    usage = shown.splitlines()[0].partition(f"{verb} ")[2]
    assert not re.search(r"[a-z{]", usage), "placeholders are capitals, without braces"
    examples = [line.split()[1:] for line in shown.splitlines() if line.startswith("    safemerge ")]
    assert examples
    for words in examples:
        assert words[0] == verb
        options = {word for word in words if word.startswith("--")}
        assert options <= set(re.findall(r"--[a-z-]+", shown.partition("Examples:")[0])), words
