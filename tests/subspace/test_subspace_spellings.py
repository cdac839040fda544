"""The table of spellings against transformers' own: names and shapes of whole models, without their weights."""

from functools import cache

import pytest
import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from safemerge_callback.adapters import canonical_name
from safemerge_callback.subspace.checkpoints.layouts import StoredTensor, weights_of
from safemerge_callback.subspace.checkpoints.shard_files import LocalFile
from safemerge_callback.subspace.checkpoints.spellings import _BY_ARCHITECTURE, Spelling, spelling_of
from tests.support.versions import above_bound, found_in

CLASSES = {
    "hrm_text": "HrmTextForCausalLM",
    "hy_v3": "HYV3ForCausalLM",
    "hy_v4": "HYV4ForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
    "laguna": "LagunaForCausalLM",
    "lfm3": "Lfm3ForCausalLM",
    "minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration",
    "nemotron_h": "NemotronHForCausalLM",
    "paddleocr_vl": "PaddleOCRVLForConditionalGeneration",
    "phimoe": "PhimoeForCausalLM",
}
# Nothing in the table, because `canonical_name` levels them.
LEVELLED = [
    "DeepseekV3ForCausalLM",
    "DeepseekVLForConditionalGeneration",
    "FalconForCausalLM",
    "Gemma3nForCausalLM",
    "Glm4MoeForCausalLM",
    "InternVLForConditionalGeneration",
    "JambaForCausalLM",
    "MllamaForConditionalGeneration",
    "OlmoeForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
]
# What holds of these families from a later version on.
LATER = {
    "Gemma3nForCausalLM": "per_layer_model_projection is saved",
    "Qwen3VLMoeForConditionalGeneration": "a config of default size makes a model",
}


@cache
def of_default_size(family):
    """A model on the meta device, where size costs nothing."""
    cls = found_in(transformers, family)
    if words := LATER.get(family):
        above_bound("transformers", words)
    with torch.device("meta"):
        return cls(cls.config_class())


def linear_shapes(model):
    head = model.get_output_embeddings()
    return {
        canonical_name(path): tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


@cache
def original_tensors(model):
    """What `save_pretrained` would write, as headers say it."""
    model._weight_conversions = get_model_conversion_mapping(model)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = {key: value for key, value in model.state_dict().items() if key not in tied}
    written = revert_weight_conversion(model, state)
    return {
        key: StoredTensor(LocalFile("some.safetensors"), tuple(value.shape), "F32") for key, value in written.items()
    }


@pytest.mark.parametrize("family", [*CLASSES.values(), *LEVELLED])
def test_every_linear_layer_has_its_name_and_shape_in_the_checkpoint(family):
    model = of_default_size(family)
    weights = weights_of(original_tensors(model), spelling_of(model.config.model_type))
    live = linear_shapes(model)
    assert live
    assert {name: weights[name].shape if name in weights else None for name in live} == live


@pytest.mark.parametrize(("architecture", "family"), CLASSES.items())
def test_every_entry_of_the_table_is_needed(architecture, family):
    if family == "PhimoeForCausalLM":
        above_bound("transformers", "the router has a name of its own in the model")
    model = of_default_size(family)
    assert model.config.model_type == architecture
    plain = weights_of(original_tensors(model), Spelling())
    assert any(name not in plain or plain[name].shape != shape for name, shape in linear_shapes(model).items())


def test_every_entry_of_the_table_is_tested():
    assert _BY_ARCHITECTURE.keys() == CLASSES.keys()
