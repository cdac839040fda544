"""The page on migration: it names every setting of the three, and what it says to run does what theirs does."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from safemerge_callback.adapters import canonical_name, load_adapter
from safemerge_callback.cli import app
from safemerge_callback.live import live_factors
from safemerge_callback.methods.aliases import COMBINATION_TYPES
from safemerge_callback.record import read_journal
from safemerge_callback.subspace import Subspace

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
# Read off the released files; SafeLoRAConfig's are its fields, the script's those of its argument parser.
SAFEMERGE = {
    "--base_model_id", "--finetuned_model_id", "--safety_model_id", "--safelora_unaligned_model_id",
    "--safelora_aligned_model_id", "--cos_threshold", "--default_merge_ratio", "--weighting", "--merge_type",
    "--density", "--output_path",
}  # fmt: skip
SAFELORA = {"base_model_path", "aligned_model_path", "select_layers_type", "threshold", "num_proj_layers", "devices"}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def rows(heading):
    """Cells of the table below a header, without code marks."""
    body = PAGE.split(heading, 1)[1].split("\n\n", 1)[0]
    lines = [line for line in body.splitlines()[1:] if "`" in line]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_every_setting_of_the_three_is_there():
    import peft

    assert {row[0] for row in rows("| flag |")} == SAFEMERGE
    assert {row[0] for row in rows("| field |")} == SAFELORA
    told = {row[0]: (row[1], row[2]) for row in rows("| `combination_type` |")}
    assert told == {name: both for name, both in COMBINATION_TYPES.items() if name != "linear_svd"}
    documented = peft.LoraModel.add_weighted_adapter.__doc__
    assert set(told) <= set(re.findall(r"\w+", documented))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files that the page names, in a tiny size: adapters of scaling 1, as PEFT's merged ones have."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("migration")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4)

    def make():
        torch.manual_seed(1)
        return LlamaForCausalLM(config)

    def moved(model, std, key):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if key in name:
                    parameter.add_(std * torch.randn_like(parameter))
        return model

    make().save_pretrained(folder / "aligned")
    moved(make(), 0.05, "").save_pretrained(folder / "unaligned")
    for name in ("task", "safety"):
        model = get_peft_model(make(), LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
        torch.manual_seed(len(name))
        moved(model, 0.2, "lora_").save_pretrained(folder / name)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A folder with links to the parts, and the subspace as the page builds it."""
    for name in ("task", "safety", "aligned", "unaligned"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    run(blocks("bash")[0])
    return tmp_path


def blocks(language):
    return [block.strip() for block in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)]


def run(line):
    words = shlex.split(line)
    assert words[0] == "safemerge"
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, result.output


def peft_model(here):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(here / "aligned"), here / "task").eval()


def dense(factors):
    return {name: f.scaling * f.B.detach().double() @ f.A.detach().double() for name, f in factors.items()}


def released_safemerge(here, threshold, weights):
    """The script's rule from its description, in float64: √w on A and on B, where ρ < τ; other modules as they are."""
    task, safety = (load_adapter(here / name).factors for name in ("task", "safety"))
    V = {n: v.double() for n, v in ((n, Subspace.load("model.subspace.safetensors").stack([n])[0]) for n in task)}
    found = {}
    for name, live in task.items():
        update = live.B.double() @ live.A.double()
        C = V[name] @ V[name].T / V[name].norm()
        cosine = torch.cosine_similarity((C @ update).flatten(), update.flatten(), dim=0)
        a, b = (w**0.5 for w in (weights if cosine < threshold else (1.0, 0.0)))
        other = safety[name]
        found[name] = (a * live.B + b * other.B).double() @ (a * live.A + b * other.A).double()
    return found


def assert_same(found, wanted, tolerance=1e-5):
    assert set(found) == set(wanted)
    for name in found:
        assert float((found[name] - wanted[name]).norm() / wanted[name].norm()) < tolerance, name


def test_the_pages_commands_and_code_run(here):
    model = peft_model(here)
    for line in blocks("bash")[1:]:
        # no module of these models lies below the paper's threshold
        run(line.replace("--threshold 0.35", "--threshold 1"))
    for code in blocks("python"):
        exec(code.replace("threshold=0.35", "threshold=1"), {"peft_model": model})
    assert sorted(model.peft_config) == ["default", "safelora", "safemerge"]
    assert model.active_adapters == ["default"]
    assert_same(dense(load_adapter("with_safelora/safelora").factors), dense(load_adapter("safelora_folder").factors))
    assert read_journal("safemerge_delta/safemerge.jsonl")[0]["config"]["weights"] == [0.8, 0.2]


def test_factor_space_is_the_released_script(here):
    line = blocks("bash")[1]
    cosines = sorted(m["cosine"] for m in measured())
    threshold = (cosines[2] + cosines[3]) / 2
    run(line.replace("0.35", str(threshold)))
    assert_same(dense(load_adapter("safemerge_factor").factors), released_safemerge(here, threshold, (0.8, 0.2)))
    run(blocks("bash")[2].replace("0.35", str(threshold)))
    task, safety = (dense(load_adapter(name).factors) for name in ("task", "safety"))
    merged = next(e for e in read_journal("safemerge_delta/safemerge.jsonl") if e["kind"] == "merge")["modules"]
    assert len(merged) == 3
    for name, update in dense(load_adapter("safemerge_delta").factors).items():
        chosen = name in {m["name"] for m in merged}
        u, s, v = torch.linalg.svd(0.8 * task[name] + 0.2 * safety[name] if chosen else task[name])
        best = (u[:, :4] * s[:4]) @ v[:4]
        assert float((update - best).norm() / best.norm()) < 1e-5


def measured():
    import json

    shown = CliRunner().invoke(app, ["measure", "task", "-s", "model.subspace.safetensors", "--json"])
    return json.loads(shown.stdout)["modules"]


def test_project_is_safe_lora(here):
    run(blocks("bash")[3])
    task = dense(load_adapter("task").factors)
    lowest = {m["name"] for m in sorted(measured(), key=lambda m: m["cosine"])[:3]}
    subspace = Subspace.load("model.subspace.safetensors")
    wanted = {}
    for name, update in task.items():
        V = subspace.stack([name])[0].double()
        wanted[name] = V @ V.T @ update / V.norm() if name in lowest else update
    assert_same(dense(load_adapter("safelora_folder").factors), wanted)


@pytest.mark.parametrize("row", rows("| `combination_type` |"), ids=lambda row: row[0])
def test_every_combination_type_is_pefts(here, row):
    """Random masks are drawn from other streams, so of those only the model's modules and scale are compared."""
    alias, method, space = row
    pruning = ["--density", "0.5"] if method not in ("linear", "cat") else []
    base = ["merge", "task", "safety", "-s", "model.subspace.safetensors", "--gate", "all", "--weights", "0.7", "0.4"]
    run(shlex.join(["safemerge", *base, "--method", method, "--space", space, *pruning, "-o", "out"]))
    Path("m.yaml").write_text(f"combination_type: {alias}\n" + ("density: 0.5\n" if pruning else ""))
    run(shlex.join(["safemerge", *base, "--config", "m.yaml", "-o", "again"]))
    ours, again = (load_adapter(name).factors for name in ("out", "again"))
    assert all(torch.equal(ours[name].B, again[name].B) for name in ours)
    model = peft_model(here)
    model.load_adapter(here / "safety", "safety")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_weighted_adapter(
            ["default", "safety"], [0.7, 0.4], "theirs", combination_type=alias, density=0.5, svd_rank=4
        )
    theirs = dense(live_factors(model, "theirs"))
    if method.startswith("dare"):
        sizes = [sum(float(u.norm()) ** 2 for u in updates.values()) ** 0.5 for updates in (dense(ours), theirs)]
        assert set(ours) == set(theirs)
        assert sizes[0] == pytest.approx(sizes[1], rel=0.25)
    else:
        assert_same(dense(ours), theirs)
    assert {canonical_name(name) for name in theirs} == set(ours)
