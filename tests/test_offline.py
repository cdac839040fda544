"""Adapters merged on disk, loaded again by plain PEFT; against the formula in float64 and against a live merge."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safemerge_callback.adapters import canonical_name, load_adapter
from safemerge_callback.decision import MergePlan, apply, measure
from safemerge_callback.errors import AdapterError, ConfigError, PlanError, SubspaceError
from safemerge_callback.live import live_factors, writer_for
from safemerge_callback.offline import measure_adapter, merge_adapters
from safemerge_callback.offline.merge_yaml import read_recipe
from safemerge_callback.record import read_journal
from safemerge_callback.subspace import Subspace
from tests.support.world import ADAPTED as TARGETS
from tests.support.world import save_lora, write_checkpoints, write_subspace


def build_world(tmp_path, make, targets=TARGETS):
    """Two checkpoints and their subspace; low-rank noise in q_proj sets its cosines apart from the others'."""
    write_checkpoints(tmp_path, make(seed=1), noise=0.05)
    write_subspace(tmp_path, "s.safetensors", targets)
    return tmp_path


@pytest.fixture
def world(tmp_path, tiny_llama):
    save_lora(tiny_llama, tmp_path / "task", seed=5)
    save_lora(tiny_llama, tmp_path / "safety", seed=6, r=2, lora_alpha=3)
    return build_world(tmp_path, tiny_llama)


def merged(world, task="task", safety="safety", output="out", **knobs):
    return merge_adapters(world / task, safety and world / safety, world / "s.safetensors", world / output, **knobs)


def loaded(make, folder):
    from peft import PeftModel

    with warnings.catch_warnings():
        # peft tells what is tied when an embedding is adapted
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        return PeftModel.from_pretrained(make(seed=1), str(folder)).eval()


def updates(make, folder):
    """Canonical name -> s·B·A of an adapter folder as PEFT loads it, float64, in map orientation."""
    found = {}
    for path, layer in loaded(make, folder).named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.scaling:
            embedding = "default" in layer.lora_embedding_A
            A = layer.lora_embedding_A["default"] if embedding else layer.lora_A["default"].weight
            B = layer.lora_embedding_B["default"] if embedding else layer.lora_B["default"].weight
            found[canonical_name(path)] = layer.scaling["default"] * B.detach().double() @ A.detach().double()
    return found


def best_rank(target, rank):
    u, s, v = torch.linalg.svd(target)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def distance(x, y):
    return float((x - y).norm() / y.norm())


def middle(world, task="task"):
    """A threshold that half of the modules lie below."""
    cosines = sorted(r.cosine for r in measure_adapter(world / task, world / "s.safetensors").values())
    return (cosines[len(cosines) // 2 - 1] + cosines[len(cosines) // 2]) / 2


def test_measuring_a_folder_equals_measuring_the_live_model(world, tiny_llama):
    live = measure(live_factors(loaded(tiny_llama, world / "task")), Subspace.load(world / "s.safetensors"))
    offline = measure_adapter(world / "task", world / "s.safetensors")
    assert set(offline) == set(live)
    assert len(offline) == 6
    for name, reading in offline.items():
        assert reading.cosine == pytest.approx(live[name].cosine, abs=1e-9)
        assert reading.update_norm == pytest.approx(live[name].update_norm, rel=1e-9)


@pytest.mark.parametrize(
    ("task", "safety"),
    [
        ({}, {}),
        ({"use_rslora": True, "r": 3}, {"r": 6, "alpha_pattern": {"v_proj": 20}}),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 5}}, {"use_rslora": True}),
    ],
)
@pytest.mark.parametrize("method", ["linear", "cat"])
def test_merged_folder_equals_the_formula(tmp_path, tiny_llama, task, safety, method):
    save_lora(tiny_llama, tmp_path / "task", seed=5, **task)
    save_lora(tiny_llama, tmp_path / "safety", seed=6, **safety)
    world = build_world(tmp_path, tiny_llama)
    threshold = middle(world)
    plan = merged(world, method=method, threshold=threshold, weights=(0.7, 0.4))
    assert len(plan.selected) == 3
    old, other, new = (updates(tiny_llama, world / folder) for folder in ("task", "safety", "out"))
    ranks = {name: f.rank for name, f in load_adapter(world / "task").factors.items()}
    for name, update in new.items():
        target = 0.7 * old[name] + 0.4 * other[name]
        if name not in plan.selected:
            assert distance(update, old[name]) < 1e-12
            assert distance(update, target) > 0.1
        else:
            assert distance(update, target if method == "cat" else best_rank(target, ranks[name])) < 2e-6


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_unselected_modules_are_there_to_the_bit(world, method):
    plan = merged(world, method=method, threshold=middle(world))
    before = load_file(world / "task" / "adapter_model.safetensors")
    after = load_file(world / "out" / "adapter_model.safetensors")
    assert set(after) == set(before)
    for key in before:
        assert torch.equal(after[key], before[key]) == (canonical_name(key) not in plan.selected)
        grew = method == "cat" and canonical_name(key) in plan.selected
        assert (after[key].shape != before[key].shape) == grew
    config = json.loads((world / "out" / "adapter_config.json").read_text())
    assert bool(config["rank_pattern"]) == (method == "cat")


def test_project_equals_safe_lora_and_needs_no_safety_adapter(world, tiny_llama):
    plan = merged(world, safety=None, method="project", threshold=middle(world))
    old, new = updates(tiny_llama, world / "task"), updates(tiny_llama, world / "out")
    aligned = load_file(world / "aligned" / "model.safetensors")
    unaligned = load_file(world / "unaligned" / "model.safetensors")
    V = {canonical_name(key): aligned[key].double() - unaligned[key].double() for key in aligned}
    assert len(plan.selected) == 3
    for name in plan.selected:
        C = V[name] @ V[name].T / V[name].norm()
        assert distance(new[name], C @ old[name]) < 1e-5
    entry = next(e for e in read_journal(world / "out" / "safemerge.jsonl") if e["kind"] == "merge")
    assert {module["task_weight"] for module in entry["modules"]} == {1.0}


@pytest.mark.parametrize("method", ["cat", "linear", "project"])
def test_transposed_and_embedding_modules(tmp_path, method):
    """GPT-2: Conv1D stores its weight transposed, and an embedding's factors have keys of their own."""
    targets = ["c_attn", "wte"]
    save_lora(tiny_gpt2, tmp_path / "task", 5, targets, fan_in_fan_out=True)
    save_lora(tiny_gpt2, tmp_path / "safety", 6, targets, r=2, fan_in_fan_out=True)
    world = build_world(tmp_path, tiny_gpt2, targets)
    plan = merged(world, gate="all", method=method, weights=(0.5, 0.5))
    old, other, new = (updates(tiny_gpt2, world / folder) for folder in ("task", "safety", "out"))
    assert set(plan.selected) == set(new) == {"wte", "h.0.attn.c_attn", "h.1.attn.c_attn"}
    aligned, unaligned = (dict(tiny_saved(world / part).named_parameters()) for part in ("aligned", "unaligned"))
    for key, weight in aligned.items():
        name = canonical_name(key)
        if name not in new:
            continue
        V = (weight - unaligned[key]).detach().double().T
        total = 0.5 * old[name] + 0.5 * other[name]
        want = {"cat": total, "linear": best_rank(total, 4), "project": V @ (V.T @ old[name]) / V.norm()}[method]
        assert distance(new[name], want) < 1e-5


def tiny_gpt2(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def tiny_saved(folder):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder)


def test_logits_equal_the_same_merge_made_live(world, tiny_llama):
    live = loaded(tiny_llama, world / "task")
    tokens = torch.arange(1, 17)[None]
    with torch.no_grad():
        before = live(tokens).logits
    subspace, writer = Subspace.load(world / "s.safetensors"), writer_for(live, adapter_name="default")
    plan = MergePlan.decide(measure(writer.gather(), subspace), gate="num_layers", num_layers=4, weights=(0.5, 0.5))
    apply(plan, writer, load_adapter(world / "safety"))
    offline = merged(world, gate="num_layers", num_layers=4, weights=(0.5, 0.5))
    assert set(offline.selected) == set(plan.selected)
    with torch.no_grad():
        here, there = live(tokens).logits, loaded(tiny_llama, world / "out")(tokens).logits
    assert float((here - there).abs().max()) < 1e-5
    assert float((before - there).abs().max()) > 1e-2


def test_half_precision_is_kept_and_computed_wide(tmp_path, tiny_llama):
    save_lora(tiny_llama, tmp_path / "task", seed=5, dtype=torch.bfloat16)
    save_lora(tiny_llama, tmp_path / "safety", seed=6)
    world = build_world(tmp_path, tiny_llama)
    merged(world, method="cat", gate="all")
    tensors = load_file(world / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    old, other, new = (load_adapter(world / folder).factors for folder in ("task", "safety", "out"))
    for name, module in new.items():
        target = sum(
            weight * f[name].scaling * f[name].B.double() @ f[name].A.double()
            for weight, f in ((0.8, old), (0.2, other))
        )
        # Both factors are rounded once, to eight bits.
        assert distance(module.scaling * module.B.double() @ module.A.double(), target) < 2**-7


def test_journal_and_card_say_what_was_done(world):
    plan = merged(world, threshold=middle(world), weights=(0.6, 0.3))
    start, check, merge, end = read_journal(world / "out" / "safemerge.jsonl")
    assert [e["kind"] for e in (start, check, merge, end)] == ["start", "check", "merge", "end"]
    assert start["config"]["finetuned"] == "task"
    assert start["config"]["weights"] == [0.6, 0.3]
    assert {m["name"]: m["merge"] for m in check["modules"]} == {n: v.merge for n, v in plan.verdicts.items()}
    assert [m["name"] for m in merge["modules"]] == list(plan.selected)
    assert {m["task_weight"] for m in merge["modules"]} == {0.6}
    assert all(0 < m["residual"] < 1 and m["change"] > 0 for m in merge["modules"])
    assert (end["merges"], end["modules_merged"]) == (1, 3)
    card = (world / "out" / "README.md").read_text()
    assert "3 of 6" in card
    assert "linear, space delta, weights 0.6 / 0.3" in card
    assert card.count("| layers.") == 3
    assert "\nbase_model:" not in card
    everything = "".join(p.read_text() for p in (world / "out").iterdir() if p.suffix in (".md", ".jsonl", ".yaml"))
    assert str(world) not in everything


def test_names_in_the_card_are_escaped(world):
    task = load_adapter(world / "task")
    evil = "<img src=x onerror=alert(1)> | [a](http://b)\n# `c` ${d}"
    safety = replace(load_adapter(world / "safety"), source=evil)
    task = replace(task, base_model="org/model")
    with pytest.warns(UserWarning, match="base models have different names.*'model'.*they must be one"):
        merge_adapters(task, safety, world / "s.safetensors", world / "out", gate="all")
    card = (world / "out" / "README.md").read_text()
    assert 'base_model: "org/model"\n' in card
    row = next(line for line in card.splitlines() if line.startswith("| safety adapter"))
    assert row == (r"| safety adapter | \<img src=x onerror=alert\(1\)\> \| \[a\]\(http://b\) \# \`c\` \$\{d\} |")


def test_nothing_selected_copies_the_adapter_and_is_warned_of(world):
    with pytest.warns(UserWarning, match="gate threshold 0 selects none of 6 modules. The closest is"):
        plan = merged(world, threshold=0.0)
    assert plan.selected == ()
    before = load_file(world / "task" / "adapter_model.safetensors")
    after = load_file(world / "out" / "adapter_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert "No module was selected" in (world / "out" / "README.md").read_text()
    assert [e["kind"] for e in read_journal(world / "out" / "safemerge.jsonl")] == ["start", "check", "end"]


def entries(folder):
    return sorted(p.name for p in folder.iterdir())


def test_an_existing_output_is_kept_unless_asked(world):
    merged(world, gate="all", weights=(1.0, 0.0))
    old = (world / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="not empty"):
        merged(world, gate="all")
    assert (world / "out" / "adapter_model.safetensors").read_bytes() == old
    merged(world, gate="all", overwrite=True)
    assert (world / "out" / "adapter_model.safetensors").read_bytes() != old
    (world / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"first .thesis\.tex."):
        merged(world, gate="all", overwrite=True)
    assert "thesis.tex" in entries(world / "out")
    (world / "empty").mkdir()
    merged(world, output="empty", gate="all")
    assert entries(world / "empty") == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "safemerge.jsonl",
        "safemerge.yaml",
    ]


@pytest.mark.parametrize(
    ("error", "match", "knobs"),
    [
        (ConfigError, "is one of the inputs", {"output": "task", "overwrite": True}),
        (ConfigError, "is one of the inputs", {"output": "x/../safety", "overwrite": True}),
        (ConfigError, "is one of the inputs", {"output": "s.safetensors"}),
        (ConfigError, "is no folder", {"output": "note"}),
        (ConfigError, "threshold=2", {"threshold": 2}),
        (ConfigError, "did you mean 'linear'", {"method": "linaer"}),
        (ConfigError, "gate 'watch' merges nothing", {"gate": "watch"}),
        (ConfigError, "'factor' is not one", {"method": "cat", "space": "factor"}),
        (ConfigError, "more than the 6", {"gate": "num_layers", "num_layers": 7}),
        (PlanError, "needs a safety adapter", {"safety": None, "method": "linear"}),
        (AdapterError, "no such folder", {"safety": "nowhere/at/all"}),
        (AdapterError, "lacks 2 of 6", {"safety": "partial", "gate": "all"}),
        (AdapterError, "needs equal ranks", {"space": "factor", "gate": "all"}),
        (SubspaceError, "lacks 2 of 8", {"task": "wider"}),
    ],
)
def test_refusals_leave_nothing_behind(world, tiny_llama, error, match, knobs):
    (world / "note").write_text("")
    save_lora(tiny_llama, world / "partial", 7, ["q_proj", "down_proj"])
    save_lora(tiny_llama, world / "wider", 7, [*TARGETS, "k_proj"])
    before = {p: p.read_bytes() for p in world.rglob("*") if p.is_file()}
    with pytest.raises(error, match=match):
        merged(world, **knobs)
    assert {p: p.read_bytes() for p in world.rglob("*") if p.is_file()} == before
    assert not (world / "out").exists()


def test_a_fault_while_writing_leaves_the_old_output(world, monkeypatch):
    merged(world, gate="all")
    before = {p.name: p.read_bytes() for p in (world / "out").iterdir()}
    beside = entries(world)

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(AdapterError, match="No space left"):
        merged(world, gate="all", weights=(0.1, 0.9), overwrite=True)
    assert {p.name: p.read_bytes() for p in (world / "out").iterdir()} == before
    assert entries(world) == beside


def test_values_that_overflow_the_dtype_are_refused(tmp_path, tiny_llama):
    save_lora(tiny_llama, tmp_path / "task", seed=5, dtype=torch.float16)
    world = build_world(tmp_path, tiny_llama)
    task = load_adapter(world / "task")
    huge = {name: replace(f, A=f.A.float(), B=f.B.float() * 1e6) for name, f in task.factors.items()}
    with pytest.raises(AdapterError, match="NaN or infinite"):
        merge_adapters(
            task, replace(task, source="huge", factors=huge), world / "s.safetensors", world / "out", gate="all"
        )
    assert entries(world) == ["aligned", "s.safetensors", "task", "unaligned"]


@pytest.mark.parametrize("method", ["ties", "dare_linear", "pcb", "slerp", "orthogonal"])
def test_every_method_merges_folders(world, tiny_llama, method):
    pruning = {} if method in ("slerp", "orthogonal") else {"density": 0.5}
    plan = merged(world, gate="all", method=method, **pruning)
    assert plan.selected
    entries = read_journal(world / "out" / "safemerge.jsonl")
    assert entries[0]["config"]["method"] == method
    assert entries[0]["config"].items() >= plan.taken.items()
    before, after = (load_adapter(world / folder).factors for folder in ("task", "out"))
    for name in plan.selected:
        assert after[name].rank == before[name].rank
        assert not torch.equal(after[name].B, before[name].B)
    # The same masks again, with the same seed; others with another.
    merged(world, output="again", gate="all", method=method, **pruning)
    same = load_adapter(world / "again").factors
    assert all(torch.equal(same[name].B, after[name].B) for name in after)
    if method == "dare_linear":
        merged(world, output="other", gate="all", method=method, seed=1, **pruning)
        assert not torch.equal(load_adapter(world / "other").factors[name].B, after[name].B)


def test_factors_of_other_ranks_are_added_where_they_are_aligned(world, tiny_llama):
    """In whatever factors the safety adapter is written: those that PEFT loads, and the same update turned."""
    save_lora(tiny_llama, world / "thin", seed=6, r=2)
    turned = load_adapter(world / "thin")
    Q = torch.tensor([[0.6, -0.8], [1.6, 1.2]])
    factors = {n: replace(f, A=torch.linalg.solve(Q, f.A), B=f.B @ Q) for n, f in turned.factors.items()}
    plans = [
        merge_adapters(
            world / "task", safety, world / "s.safetensors", world / output, gate="all", space="aligned_factor"
        )
        for safety, output in ((world / "thin", "out"), (replace(turned, factors=factors), "again"))
    ]
    first, second = updates(tiny_llama, world / "out"), updates(tiny_llama, world / "again")
    assert {*plans[0].selected} == {*first}
    assert max(distance(second[name], first[name]) for name in first) < 1e-4


def test_the_strength_of_orthogonal_is_written_and_made_again(world):
    merged(world, gate="all", method="orthogonal", weights=(0.5, 0.5), strength=0.1)
    settings = read_recipe(world / "out" / "safemerge.yaml")
    merge_adapters(**settings, output=world / "again")
    first, second = (load_adapter(world / folder).factors for folder in ("out", "again"))
    assert all(torch.equal(second[name].B, first[name].B) for name in first)
    assert read_recipe(world / "again" / "safemerge.yaml")["strength"] == 0.1


def test_a_density_is_refused_before_anything_is_read(world):
    with pytest.raises(ConfigError, match="density is missing"):
        merged(world, task="nowhere", method="ties")
    with pytest.raises(ConfigError, match="does not read"):
        merged(world, task="nowhere", density=0.5)


def test_several_adapters_and_weights_by_module(world, tiny_llama):
    """The first safety adapter is added, the second taken away, in v_proj by weights of its own."""
    save_lora(tiny_llama, world / "unsafe", seed=7, r=3)
    names = [world / "safety", world / "unsafe"]
    asked = {"v_proj": (0.6, 0.4, -0.3)}
    plan = merge_adapters(
        world / "task",
        names,
        world / "s.safetensors",
        world / "out",
        gate="all",
        method="cat",
        weights=(1.0, 0.5, -0.5),
        module_weights=asked,
    )
    task, safe, unsafe, found = (updates(tiny_llama, world / f) for f in ("task", "safety", "unsafe", "out"))
    for name in found:
        w = asked["v_proj"] if "v_proj" in name else (1.0, 0.5, -0.5)
        want = w[0] * task[name] + w[1] * safe[name] + w[2] * unsafe[name]
        assert distance(found[name], want) < 1e-5
    card = (world / "out" / "README.md").read_text()
    assert "safety, unsafe" in card
    assert "weights 1 / 0.5 / -0.5, v\\_proj 0.6 / 0.4 / -0.3" in card
    start, *_, merge, _ = read_journal(world / "out" / "safemerge.jsonl")
    assert start["config"]["safety_adapter"] == "safety, unsafe"
    assert merge["module_weights"] == {"v_proj": [0.6, 0.4, -0.3]}
    assert len(plan.selected) == len(found)


def test_pull_and_the_orthogonal_projection_need_no_safety_adapter(world, tiny_llama):
    task = updates(tiny_llama, world / "task")
    merged(world, safety=None, output="pulled", gate="all", method="pull", strength=0.25)
    found = updates(tiny_llama, world / "pulled")
    assert max(distance(found[name], 0.75 * update) for name, update in task.items()) < 1e-6
    once = {"gate": "all", "method": "project", "operator": "orthogonal", "operator_rank": 4}
    merged(world, safety=None, output="once", **once)
    merged(world, task="once", safety=None, output="twice", **once)
    first, second = updates(tiny_llama, world / "once"), updates(tiny_llama, world / "twice")
    assert max(distance(second[name], first[name]) for name in task) < 1e-5
    assert min(distance(first[name], task[name]) for name in task) > 0.5


@pytest.mark.parametrize(
    ("match", "knobs"),
    [
        ("average of a run's own updates", {"method": "ema"}),
        ("weights are missing with 2 safety adapters: give 3", {"safety": ["safety", "safety"]}),
        ("with 1 safety adapters: give two", {"weights": (1.0, 0.5, -0.5)}),
        ("strength is 0.5, which method 'linear'", {"strength": 0.5}),
        ("'o_proj' fits none of the", {"gate": "all", "module_weights": {"o_proj": (0.5, 0.5)}}),
    ],
)
def test_weights_that_do_not_fit_write_nothing(world, match, knobs):
    safety = [world / name for name in knobs.pop("safety", ["safety"])]
    with pytest.raises(ConfigError, match=match):
        merge_adapters(world / "task", safety, world / "s.safetensors", world / "out", **knobs)
    assert not (world / "out").exists()
