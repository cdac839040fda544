"""Cells: one a trainer, of transformers and of TRL, the experimental ones included."""

from __future__ import annotations

from typing import Any

from . import data
from .cell import TrainerCell
from .setups import plain, trl
from .world import Base

ROLLOUT: dict[str, Any] = {"max_completion_length": 6, "num_generations": 2, "per_device_train_batch_size": 2}
BEMA = "trl.experimental.bema_for_ref_model.dpo_trainer"
SERVED = "a generation server (vLLM) and a GPU's attention kernels"
TEACHER = "a teacher's server (vLLM)"
HEAD = {"task_type": "SEQ_CLS"}


def _rewarded(_: Base) -> dict[str, Any]:
    return {"reward_funcs": data.pays}


def _taught(base: Base) -> dict[str, Any]:
    return {"teacher_model": base.model()}


def _experimental(package: str, trainer: str, rows: Any, *, needs: str = "", **more: Any) -> TrainerCell:
    setup = trl(trainer, f"{trainer[:-7]}Config", rows, home=f"trl.experimental.{package}", **more)
    return TrainerCell("TRL, experimental", trainer, setup, needs=needs)


TRANSFORMERS = [
    TrainerCell("transformers", "Trainer", plain(data.tokens)),
    TrainerCell(
        "transformers",
        "Trainer, sequence classification",
        plain(data.classes, kind="AutoModelForSequenceClassification", task_type="SEQ_CLS"),
    ),
    TrainerCell(
        "transformers",
        "Trainer, token classification",
        plain(lambda: data.classes(per_token=True), kind="AutoModelForTokenClassification", task_type="TOKEN_CLS"),
    ),
    TrainerCell(
        "transformers",
        "Seq2SeqTrainer (T5)",
        plain(
            data.tokens,
            trainer="Seq2SeqTrainer",
            config="Seq2SeqTrainingArguments",
            task_type="SEQ_2_SEQ_LM",
            target_modules=["q", "v"],
        ),
        family="t5",
    ),
]

TRL = [
    TrainerCell("TRL", "SFTTrainer", trl("SFTTrainer", "SFTConfig", data.text)),
    TrainerCell("TRL", "DPOTrainer", trl("DPOTrainer", "DPOConfig", data.preferences)),
    TrainerCell("TRL", "KTOTrainer", trl("KTOTrainer", "KTOConfig", data.judged)),
    TrainerCell(
        "TRL",
        "RewardTrainer",
        trl(
            "RewardTrainer",
            "RewardConfig",
            data.preferences,
            kind="AutoModelForSequenceClassification",
            loading={"num_labels": 1},
            peft={**HEAD, "modules_to_save": ["score"]},
        ),
    ),
    TrainerCell(
        "TRL", "GRPOTrainer", trl("GRPOTrainer", "GRPOConfig", data.prompts, arguments_of=_rewarded, **ROLLOUT)
    ),
    TrainerCell(
        "TRL", "RLOOTrainer", trl("RLOOTrainer", "RLOOConfig", data.prompts, arguments_of=_rewarded, **ROLLOUT)
    ),
    TrainerCell(
        "TRL",
        "DistillationTrainer",
        trl("DistillationTrainer", "DistillationConfig", data.questions, arguments_of=_taught, max_completion_length=6),
    ),
]

EXPERIMENTAL = [
    _experimental(
        "a2po", "A2POTrainer", data.prompts, arguments_of=_rewarded, give="PeftModel", max_completion_length=6
    ),
    _experimental("cpo", "CPOTrainer", data.preferences),
    _experimental("gkd", "GKDTrainer", data.chat, arguments_of=_taught, max_new_tokens=6),
    _experimental("gmpo", "GMPOTrainer", data.prompts, arguments_of=_rewarded, **ROLLOUT),
    _experimental(
        "gold", "GOLDTrainer", data.chat, arguments_of=_taught, max_completion_length=6, use_extended_uld=False
    ),
    _experimental("iw_opd", "IWOPDTrainer", data.chat, arguments_of=_taught, max_completion_length=6),
    _experimental("online_dpo", "OnlineDPOTrainer", data.prompts, arguments_of=_rewarded, max_new_tokens=6),
    _experimental("orpo", "ORPOTrainer", data.preferences),
    _experimental("sdft", "SDFTTrainer", data.advised, max_completion_length=6, num_generations=1, distillation_topk=8),
    _experimental(
        "sdpo", "SDPOTrainer", data.advised, arguments_of=_rewarded, include_environment_feedback=True, **ROLLOUT
    ),
    _experimental("tpo", "TPOTrainer", data.triples),
    TrainerCell(
        "TRL, experimental",
        "DPOTrainer (bema_for_ref_model)",
        trl("DPOTrainer", "DPOConfig", data.preferences, home=BEMA, config_home="trl"),
    ),
    _experimental("async_grpo", "AsyncGRPOTrainer", data.prompts, arguments_of=_rewarded, give="path", needs=SERVED),
    _experimental("async_distillation", "AsyncDistillationTrainer", data.prompts, give="path", needs=SERVED),
    _experimental("server_distillation", "ServerDistillationTrainer", data.questions, needs=TEACHER),
]
