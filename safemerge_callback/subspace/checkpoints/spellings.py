"""What transformers rewrites on load: how an architecture's checkpoints differ from its model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple


class Spelling(NamedTuple):
    """How one architecture's checkpoint differs from its model, beyond what `canonical_name` levels for all.

    renamed: pattern in a key -> replacement. apart: a fused layer of the checkpoint -> the layers of the model that it
    holds one after another in equal parts. together: a fused layer of the model -> those of the checkpoint.
    """

    renamed: Mapping[str, str] = {}
    apart: Mapping[str, tuple[str, ...]] = {}
    together: Mapping[str, tuple[str, ...]] = {}

    def of(self, key: str) -> str:
        """Return the key as the model spells it."""
        for pattern, spelling in self.renamed.items():
            key = re.sub(pattern, spelling, key)
        return key


_GATE_UP = {"gate_up_proj": ("gate_proj", "up_proj")}
# By `model_type` in config.json. The tests hold this table against transformers' own conversions.
_BY_ARCHITECTURE = {
    "hrm_text": Spelling(
        {r"\.attn\.": ".self_attn."},
        apart={"gqkv_proj": ("gate_proj", "q_proj", "k_proj", "v_proj"), **_GATE_UP},
    ),
    "hy_v3": Spelling({r"\.shared_mlp\.": ".shared_experts."}),
    "hy_v4": Spelling({r"\.linear_gate\.": ".gate_proj."}),
    "kimi_linear": Spelling({r"\.self_attn\.(f_[ab]_proj)\.": r".self_attn.forget_gate.\1."}),
    "laguna": Spelling({r"\.shared_expert\.": ".shared_experts."}),
    "lfm3": Spelling({r"\.self_attn\.gate_proj\.": ".self_attn.g_proj."}),
    "minimax_m3_vl": Spelling(
        {
            r"(vision_tower)\.vision_model\.encoder\.": r"\1.",
            r"^patch_merge_mlp\.linear_": "multi_modal_projector.merge_linear_",
            r"\.self_attn\.index_([qk]_proj)\.": r".self_attn.indexer.\1.",
        },
        together=_GATE_UP,
    ),
    "nemotron_h": Spelling({r"^backbone\.": "model."}),
    "paddleocr_vl": Spelling({r"^mlp_AR\.": "model.projector."}),
    "phimoe": Spelling({r"\.block_sparse_moe\.gate\.": ".mlp.router."}),
}


def spelling_of(architecture: str | None) -> Spelling:
    """Return how checkpoints of this `model_type` differ from the model; not at all for most."""
    return _BY_ARCHITECTURE.get(architecture or "", Spelling())
