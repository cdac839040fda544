"""Every YAML file of the repository is parsed by the recipe that it names, and counted."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from recipes.arguments import PREFIX, SafeMergeArguments, parse
from recipes.evaluate import EvaluateArguments
from recipes.finetune import parse_finetune
from recipes.models import PACKAGED
from recipes.settings import read_settings
from recipes.train_safety_adapter import parse_train
from safemerge_callback.corrections.registry import CORRECTIONS
from safemerge_callback.errors import ConfigError
from safemerge_callback.training import SafeMergeConfig
from safemerge_callback.training.run.forecast import forecast, too_strong

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
COUNTS = {
    "accelerate": 6,
    "align": 1,
    "dpo": 2,
    "evaluate": 8,
    "finetune": 38,
    "finetune_zo": 2,
    "grpo": 2,
    "merge": 13,
    "train_safety_adapter": 15,
}
# transformers 5.23 calls it activation_checkpointing; trl 1.x, and earlier transformers, know the old name alone
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def files(folder):
    return sorted((CONFIGS / folder).glob("*.yaml"))


def settings(path):
    """Those of a file over those of its base."""
    return read_settings(path, "config file")


def on_cpu(path):
    """The file as it is, but for what only a GPU can do."""
    return ["--config", str(path), "--bf16", "false", "--use_cpu", "true"]


def test_every_file_is_in_a_folder_that_a_test_below_walks():
    found = {folder: len(files(folder)) for folder in COUNTS}
    assert found == COUNTS
    assert len(list(CONFIGS.rglob("*.*"))) == sum(COUNTS.values())


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_the_first_line_is_the_command_that_runs_the_file(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith(("# accelerate launch ", "# python -m recipes.", "# safemerge "))
    assert str(path.relative_to(ROOT)) in first
    named = re.findall(r"\S+\.(?:yaml|py)\b", first)
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_files_that_a_header_or_a_value_names_exist(path):
    mentioned = re.findall(r"(?:configs|recipes|method_comparison)/[\w./]*\w", path.read_text())
    assert [name for name in mentioned if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", files("finetune"), ids=lambda p: p.stem)
def test_finetune_files(path):
    data, sft, model, safemerge = parse_finetune(on_cpu(path))
    given = settings(path)
    assert model.use_peft
    assert sft.completion_only_loss
    assert sft.gradient_checkpointing is given["gradient_checkpointing"]
    assert sft.learning_rate == float(given["learning_rate"])
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    assert path.stem.startswith(Path(sft.output_dir).name)
    assert data.data.partition(":")[0] in path.stem
    assert (safemerge is not None) == any(f"_{name}" in path.stem for name in ("safemerge", *CORRECTIONS))
    if path.stem.endswith("_safemerge"):
        assert (safemerge.gate, safemerge.threshold, safemerge.weights) == ("threshold", 0.35, [0.8, 0.2])
        assert safemerge.every > 0


@pytest.mark.parametrize("path", [p for p in files("finetune") if "_safemerge" in p.stem], ids=lambda p: p.stem)
def test_a_guarded_file_leaves_the_task_its_share_whatever_the_runs_length(path):
    _, sft, _, safemerge = parse_finetune(on_cpu(path))
    # one epoch on eight devices, three epochs on one
    for max_steps in [sft.max_steps] if sft.max_steps > 0 else [350, 2800, 8000]:
        plan = forecast(safemerge, ["layers.0.self_attn.q_proj"], max_steps)
        assert too_strong(safemerge, plan, max_steps) is None
        assert plan.merges <= 6 or plan.left is None


@pytest.mark.parametrize(
    "page", ["integrations/axolotl", "integrations/llama_factory", "integrations/ms_swift", "plain_loop"]
)
def test_no_page_shows_a_schedule_in_steps(page):
    """Its strength would grow with the reader's run; 0 is the end alone, and a probe changes nothing."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        assert not re.search(r"(?<!ema_)\bevery\W{1,3}[1-9]|safemerge_every\W{1,3}[1-9]", block), block


@pytest.mark.parametrize("path", [p for p in files("finetune") if "_safemerge" in p.stem], ids=lambda p: p.stem)
def test_a_guarded_file_differs_from_the_plain_one_by_the_callback_alone(path):
    plain = settings(path.with_stem(path.stem.partition("_safemerge")[0]))
    guarded = settings(path)
    differing = {key for key in guarded.keys() | plain.keys() if guarded.get(key) != plain.get(key)}
    assert {key for key in differing if not key.startswith(PREFIX)} == {"output_dir"}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_file_repeats_nothing_that_its_base_says(path):
    own = yaml.safe_load(path.read_text())
    base = settings(path.parent / own["base"]) if "base" in own else {}
    assert [key for key, value in own.items() if key in base and base[key] == value] == []


@pytest.mark.parametrize("path", files("align"), ids=lambda p: p.stem)
def test_align_files(path):
    data, sft, model, safemerge = parse_finetune(on_cpu(path))
    assert (data.data, model.use_peft, sft.completion_only_loss, safemerge) == ("safety", False, True, None)
    made = [settings(file).get("model_name_or_path") for file in files("train_safety_adapter")]
    assert sft.output_dir in made


@pytest.mark.parametrize("path", files("train_safety_adapter"), ids=lambda p: p.stem)
def test_train_safety_adapter_files(path):
    data, sft, model, about, safemerge = parse_train(on_cpu(path))
    assert data.data == next((one for one in ("helpful", "harmless", "honest") if one in path.stem), "safety")
    chosen = safemerge.chosen_corrections if safemerge else []
    hardenings = ("booster", "vaccine", "t_vaccine")
    assert [one.kind.name for one in chosen] == [name for name in hardenings if path.stem == f"smollm2_safety_{name}"]
    assert bool(data.harmful_rows) == any(getattr(one.settings, "rows", None) for one in chosen)
    assert model.use_peft
    assert sft.save_strategy == "no"
    assert about.description
    if model.model_name_or_path in PACKAGED:
        names = {"gemma": "google/gemma-3-270m"}
        smollm2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert about.base_model_name == names.get(model.model_name_or_path, smollm2)


def test_every_safety_adapter_that_a_run_needs_has_a_file_that_makes_it():
    made = {parse_train(on_cpu(path))[1].output_dir for path in files("train_safety_adapter")}
    needed = {settings(path).get("safemerge_safety_adapter") for path in files("finetune")} - {None}
    buffers = {settings(path).get("buffer_adapter") for path in CONFIGS.rglob("*.yaml")} - {None}
    assert needed | buffers <= made


@pytest.mark.parametrize("path", files("evaluate"), ids=lambda p: p.stem)
def test_evaluate_files(path):
    (arguments,) = parse((EvaluateArguments,), ["--config", str(path)])
    assert arguments.n_task > 0, "harm is never reported without utility"
    made = {settings(file)["output_dir"] for file in files("finetune")}
    assert arguments.adapter is None or arguments.adapter in made


@pytest.mark.parametrize("path", files("accelerate"), ids=lambda p: p.stem)
def test_accelerate_files(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if path.stem in ("cpu", "one_gpu") else 4)
    assert config.use_cpu is (path.stem == "cpu")


def test_every_knob_of_the_callback_is_an_argument_once():
    assert [field.name for field in fields(SafeMergeArguments)] == [PREFIX + f.name for f in fields(SafeMergeConfig)]


def arguments(*more):
    return ["--output_dir", "out", "--data", "sentiment", "--bf16", "false", "--use_cpu", "true", *more]


def test_knobs_reach_the_callback_from_the_command_line():
    knobs = ["--safemerge_subspace", "s", "--safemerge_safety_adapter", "a", "--safemerge_weights", "0.6", "0.4"]
    *_, safemerge = parse_finetune(arguments(*knobs, "--safemerge_every", "7", "--safemerge_at_train_end", "false"))
    assert safemerge == SafeMergeConfig("s", "a", weights=[0.6, 0.4], every=7, at_train_end=False)


def test_without_a_subspace_there_is_no_callback_and_no_idle_knob():
    assert parse_finetune(arguments())[-1] is None
    with pytest.raises(ConfigError, match=r"safemerge_every.*no effect without safemerge_subspace"):
        parse_finetune(arguments("--safemerge_every", "7"))


def test_corrections_may_be_a_yaml_file_or_json(tmp_path):
    path = tmp_path / "corrections.yaml"
    path.write_text("- {replay: {every: 3}}\n- {booster: {}}\n")
    rows = ("--harmful_rows", "2")
    chosen = parse_finetune(arguments("--safemerge_corrections", str(path), *rows))[-1].chosen_corrections
    written = '[{"replay": {"every": 3}}, {"booster": {}}]'
    assert chosen == parse_finetune(arguments("--safemerge_corrections", written, *rows))[-1].chosen_corrections
    assert [(one.kind.name, len(one.settings.rows or ())) for one in chosen] == [("replay", 0), ("booster", 2)]
    with pytest.raises(ConfigError, match=r"corrections 'lost.yaml'"):
        parse_finetune(arguments("--safemerge_corrections", "lost.yaml"))


def test_a_value_that_the_callback_refuses_is_refused_here():
    with pytest.raises(ConfigError, match=r"threshold.*3\.0"):
        parse_finetune(arguments("--safemerge_subspace", "s", "--safemerge_threshold", "3"))


def test_an_unknown_key_is_refused_with_the_nearest(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: sentiment\noutput_dir: out\nsafemerge_treshold: 0.2\n")
    with pytest.raises(ConfigError, match="'safemerge_treshold' is unknown; did you mean 'safemerge_threshold'"):
        parse_finetune(on_cpu(path))
    with pytest.raises(ConfigError, match="'lora_rank' is unknown"):
        parse_finetune(arguments("--lora_rank", "8"))
