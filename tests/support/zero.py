"""DeepSpeed's settings, the same for all that train with it."""

from __future__ import annotations

from typing import Any


def zero_config(stage: int, half: bool, **zero: Any) -> dict[str, Any]:
    """Return the settings of ZeRO at `stage`, in bf16 where `half`, for an optimizer of torch's own on the CPU.

    `zero`: more of `zero_optimization`.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": half},
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
