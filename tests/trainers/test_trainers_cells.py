"""The main cells of the trainers' matrix, one test each: the same runs and checks that make the table."""

import importlib.util

import pytest

from benchmarks.trainers.cell import run
from benchmarks.trainers_matrix import CELLS

# trl 1.16 sets by default what transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
BY_NAME = {cell.name: cell for cell in CELLS}
WORK = [
    "Trainer",
    "Trainer, sequence classification",
    "Seq2SeqTrainer (T5)",
    "SFTTrainer",
    "DPOTrainer",
    "KTOTrainer",
    "RewardTrainer",
    "GRPOTrainer",
    "rank_pattern and alpha_pattern",
    "rsLoRA",
    "PiSSA",
    "OLoRA",
    "the second adapter trained",
    "two active, adapter_name given",
    "DPOTrainer given a PeftModel (adds ref)",
    "modules_to_save: lm_head",
    "GPT-2 (Conv1D)",
    "tied embeddings",
    "bf16 base, bf16 factors",
    "gradient checkpointing, not reentrant",
    "model.compile() before the trainer",
    "SFTTrainer, packing (bfd)",
]
REFUSED = {
    "DoRA": "DoRA also rescales the base weight",
    "two adapters active": "2 LoRA adapters are active",
    "mixture of experts, experts through target_parameters": "not one matrix on one weight",
    "tied embeddings, LoRA on both, ensure_weight_tying": "share one tensor",
}


@pytest.mark.parametrize("name", WORK)
def test_a_cell_works(name, bases, tmp_path):
    outcome = run(BY_NAME[name], bases(BY_NAME[name].family), tmp_path)
    assert outcome.status == "works", outcome.why
    assert outcome.modules >= 4
    assert outcome.merges == 3


@pytest.mark.parametrize("name", ["bitsandbytes nf4, SFTTrainer", "bitsandbytes int8, Trainer"])
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_quantised_base_works(name, bases, tmp_path):
    outcome = run(BY_NAME[name], bases("wide"), tmp_path)
    assert outcome.status == "works", outcome.why


@pytest.mark.parametrize("name", REFUSED)
def test_a_cell_is_refused_before_training(name, bases, tmp_path):
    outcome = run(BY_NAME[name], bases(BY_NAME[name].family), tmp_path)
    assert outcome.status == "refused", outcome.why
    assert REFUSED[name] in outcome.why
    assert not (tmp_path / "safemerge.jsonl").exists()
