"""The loss of a live model is that of its own forward passes, and taking it moves nothing."""

import pytest
import torch

from safemerge_callback.errors import ConfigError
from safemerge_callback.signals.losses import EVAL_BATCHES, EvalLoss, mean_loss

BATCHES = [{"input_ids": torch.tensor([[1 + i, 2, 3]]), "labels": torch.tensor([[1 + i, 2, 3]])} for i in range(4)]


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(attention_dropout=0.9).train()


def test_the_mean_of_the_first_batches_in_evaluation_mode(model):
    drawn = torch.get_rng_state()
    losses = [mean_loss(model, BATCHES), mean_loss(model, iter(BATCHES), limit=2)]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training
    model.eval()
    with torch.no_grad():
        each = [model(**batch).loss for batch in BATCHES]
    assert losses == [torch.stack(each).mean().item(), torch.stack(each[:2]).mean().item()]


def test_a_model_that_gives_no_loss_is_in_training_again(model):
    with pytest.raises(AttributeError):
        mean_loss(model, [{"input_ids": BATCHES[0]["input_ids"]}])
    assert all(module.training for module in model.modules())


def test_evaluation_batches_are_read_once_and_the_loader_is_ended(model):
    class Loader(list):
        gradient_state, ended = None, 0

        def end(self):
            self.ended += 1

    loader = Loader(BATCHES * 20)
    loss = EvalLoss(lambda: loader)
    loss.load()
    loader.clear()
    loss.load()
    assert (len(loss.batches), loader.ended) == (EVAL_BATCHES, 1)
    assert loss(model) == mean_loss(model, (BATCHES * 20)[:EVAL_BATCHES])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "holds no batch: give the trainer's"),
        (lambda: 1 / 0, r"cannot be read \(ZeroDivisionError"),
        (3, "TypeError"),
    ],
)
def test_batches_that_cannot_be_are_refused(source, words):
    with pytest.raises(ConfigError, match=f"eval_batches .*{words}"):
        EvalLoss(source).load()
