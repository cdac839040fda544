"""A file of settings that are those of another but for some."""

import pytest

from recipes.finetune import parse_finetune
from recipes.settings import read_settings
from safemerge_callback.errors import ConfigError

# transformers 5.23 calls it activation_checkpointing; trl 1.x, and earlier transformers, know the old name alone
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
UNDER = """data: sentiment
output_dir: runs/under
learning_rate: 1.0e-3
warmup_steps: 0.03
save_strategy: "no"
bf16: false
use_cpu: true
lora_target_modules: [q_proj, v_proj]
chat_template_kwargs: {enable_thinking: false, reasoning: low}
"""


@pytest.fixture
def under(tmp_path):
    (tmp_path / "under.yaml").write_text(UNDER)
    return tmp_path


def over(folder, text, base="under.yaml"):
    (folder / "runs").mkdir()
    path = folder / "runs" / "over.yaml"
    path.write_text(f"base: {base}\n{text}")
    return path


def test_a_recipe_reads_a_file_over_its_base_and_the_command_line_over_both(under):
    path = over(under, "output_dir: runs/over\nchat_template_kwargs: {reasoning: high}\n", "../under.yaml")
    data, sft, model, safemerge = parse_finetune(["--config", str(path), "--seed", "7"])
    assert (data.data, sft.output_dir, sft.seed, safemerge) == ("sentiment", "runs/over", 7, None)
    assert (sft.learning_rate, sft.warmup_steps, sft.save_strategy) == (1e-3, 0.03, "no")
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    assert data.chat_template_kwargs == {"enable_thinking": False, "reasoning": "high"}
    assert sorted(file.name for file in under.rglob("*.yaml")) == ["over.yaml", "under.yaml"]


@pytest.mark.parametrize(
    ("base", "match"),
    [
        ("absent.yaml", r"config file '.*absent.yaml' cannot be read"),
        ("over.yaml", r"base of config file .* is 'over.yaml': name a config file that has none itself, by its path"),
        ("../runs/over.yaml", "has none itself"),
        ("[../under.yaml]", "has none itself"),
        ("3", "base of config file .* is 3: name"),
    ],
)
def test_a_base_that_is_none_or_has_one_is_refused(under, base, match):
    with pytest.raises(ConfigError, match=match):
        parse_finetune(["--config", str(over(under, "", base))])


def test_a_mistyped_key_of_a_base_is_refused(under):
    (under / "under.yaml").write_text(UNDER + "lerning_rate: 1\n")
    with pytest.raises(ConfigError, match="'lerning_rate' is unknown; did you mean 'learning_rate'"):
        parse_finetune(["--config", str(over(under, "", "../under.yaml"))])


def test_a_file_of_no_settings_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds list: it must map settings to values"):
        read_settings(path, "config file")
    with pytest.raises(ConfigError, match="holds list: it must map settings to values"):
        parse_finetune(["--config", str(path)])
