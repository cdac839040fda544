"""The reference of safety rows: what the model says with its adapter off, whole or its likeliest tokens."""

import copy

import pytest
import torch

from safemerge_callback.errors import ConfigError
from safemerge_callback.signals.adapter_off import adapter_off
from safemerge_callback.signals.reference import take_reference
from safemerge_callback.signals.row_batch import row_batch, row_outputs
from safemerge_callback.signals.rows import RowTokens
from tests.support.world import with_lora

ROWS = [RowTokens((3, 4, 5), (6, 7, 8), "harm"), RowTokens((9, 10, 11, 12, 13), (14,), "benign")]


def moved(model, seed=0):
    """The same model, its adapter no longer zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def one_by_one(model, row):
    """Logits of a row's targets and the state at its prompt's end, without any padding."""
    ids = torch.tensor([[*row.prompt, *row.response]])
    outputs = model(input_ids=ids, output_hidden_states=True)
    first = len(row.prompt) - 1
    return outputs.logits[0, first:-1].float(), outputs.hidden_states[-1][0, first].float()


def test_a_batch_says_what_each_row_says_alone(world):
    model = moved(world.model()).eval()
    batch = row_batch(ROWS)
    outputs = row_outputs(model, batch, hidden=True)
    assert outputs.logits.shape == (2, 3, 64)
    for n, row in enumerate(ROWS):
        logits, state = one_by_one(model, row)
        assert torch.allclose(outputs.logits[n][batch.mask[n]], logits, atol=1e-5)
        assert torch.allclose(outputs.hidden[n], state, atol=1e-5)
        assert batch.targets[n][batch.mask[n]].tolist() == list(row.response)


def test_rows_without_tokens_are_refused():
    for rows in ([], [RowTokens((3,), (), "harm")], [RowTokens((), (3,), "harm")]):
        with pytest.raises(ValueError, match="must have tokens"):
            row_batch(rows)


@pytest.mark.parametrize("top_k", [None, 64, 5])
def test_the_reference_is_the_model_with_its_adapter_off(world, top_k):
    model = moved(world.model())
    with adapter_off(model):
        reference = take_reference(model, ROWS, top_k=top_k, hidden=True, batch_size=1)
    aligned = copy.deepcopy(world.aligned).eval()
    for row, said in zip(ROWS, reference, strict=True):
        logits, state = one_by_one(aligned, row)
        log_probs = logits.log_softmax(-1)
        own = log_probs[range(len(row.response)), list(row.response)]
        assert said.loss == pytest.approx(-float(own.mean()), abs=1e-5)
        assert torch.allclose(said.hidden, state, atol=1e-5)
        if top_k == 5:
            kept, tokens = log_probs.topk(5)
            assert torch.equal(said.tokens, tokens)
            assert torch.allclose(said.log_probs, kept, atol=1e-5)
            assert torch.allclose(said.rest.exp(), 1 - kept.exp().sum(-1), atol=1e-5)
        else:
            assert said.tokens is None
            assert torch.allclose(said.log_probs, log_probs, atol=1e-5)
    mean, most = reference.rest_mass
    assert 0 < mean <= most < 1 if top_k == 5 else (mean, most) == (0.0, 0.0)
    again = reference.rows([1, 0], "cpu")
    assert again.log_probs.shape[:2] == (2, 3)
    assert torch.equal(again.log_probs[0, 2:], reference[1].log_probs)


def test_putting_the_adapter_off_leaves_what_was_frozen_frozen(world):
    model = world.model()
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad = False
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(KeyError), adapter_off(model):
        raise KeyError
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("beside", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}])
def test_what_is_trained_beside_the_factors_and_off_with_them_leaves_the_reference(world, beside):
    model = world.model(**beside)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1)
    with adapter_off(model):
        reference = take_reference(model, ROWS, top_k=None)
    logits, _ = one_by_one(copy.deepcopy(world.aligned).eval(), ROWS[0])
    assert torch.allclose(reference[0].log_probs, logits.log_softmax(-1), atol=1e-5)


@pytest.mark.parametrize("lora", [{"bias": "all"}, {"bias": "lora_only"}, {}])
def test_a_base_that_is_trained_is_no_reference(tiny_qwen2, lora):
    model = with_lora(tiny_qwen2(), ["q_proj"], task_type="CAUSAL_LM", **lora)
    if not lora:
        model.get_base_model().lm_head.weight.requires_grad_(True)
    says = {"all": "q_proj.base_layer.bias' and 5 more", "lora_only": "q_proj.base_layer.bias' and 1 more"}
    with (
        pytest.raises(ConfigError, match=says.get(lora.get("bias"), "lm_head.weight' are trained")),
        adapter_off(model),
    ):
        pass


def test_a_model_without_an_adapter_or_with_one_merged_has_no_reference(world):
    with pytest.raises(ConfigError, match="no adapter that could be put off"), adapter_off(world.aligned):
        pass
    model = world.model()
    model.merge_adapter()
    with pytest.raises(ConfigError, match="is merged into the base weight"), adapter_off(model):
        pass
    model = world.model(init_lora_weights="pissa")
    with pytest.raises(ConfigError, match="began as a part of the base weight"), adapter_off(model):
        pass
