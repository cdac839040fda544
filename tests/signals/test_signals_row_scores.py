import pytest
import torch

from safemerge_callback.signals.row_scores import mean_states, response_losses
from safemerge_callback.signals.rows import RowTokens

ROWS = [
    RowTokens((1, 3, 5, 6), (7, 8, 2), "harm"),
    RowTokens((1, 3, 9), (10,), "benign"),
    RowTokens((1, 3, 11, 12, 13, 14), (15, 16, 17, 18, 2), "benign"),
]


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(attention_dropout=0.5, initializer_range=0.3)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_losses_are_those_of_each_row_alone(model, batch_size):
    losses = response_losses(model.train(), ROWS, batch_size)
    model.eval()
    for row, loss in zip(ROWS, losses, strict=True):
        ids = torch.tensor([[*row.prompt, *row.response]])
        labels = ids.clone()
        labels[0, : len(row.prompt)] = -100
        with torch.no_grad():
            assert loss == pytest.approx(float(model(input_ids=ids, labels=labels).loss), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_states_are_means_over_the_texts_own_tokens(model, batch_size):
    texts = [[1, 3, 5, 6, 7], [1], [1, 3, 9]]
    states = mean_states(model.train(), texts, batch_size)
    model.eval()
    for text, state in zip(texts, states, strict=True):
        with torch.no_grad():
            last = model.model(input_ids=torch.tensor([text])).last_hidden_state[0]
        assert torch.allclose(state, last.mean(0), atol=1e-5)


def test_the_model_is_left_as_it_was(model):
    model.train()
    state = torch.get_rng_state()
    response_losses(model, ROWS)
    mean_states(model, [[1, 2]])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
