"""The places that are learned, alone: TRL's own loss, gradients and metrics, in less time."""

import copy
import warnings

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from recipes import completion_trainer
from recipes.completion_trainer import CompletionTrainer, agrees, beginning_once, draws_noise, labelled_places
from safemerge_callback.corrections.token_weights import weighed_tokens
from safemerge_callback.signals.token_gains import answer_tokens, headed
from tests.support.world import with_lora

BEGINNING = [1, *range(30, 42)]
ROWS = [
    {
        "input_ids": [*BEGINNING, *range(n, 4, -1), 2],
        "completion_mask": [0] * (len(BEGINNING) + n - 3 - answer) + [1] * answer,
    }
    for n, answer in ((6, 1), (17, 2), (9, 5), (7, 1), (24, 3), (16, 12))
]


@pytest.fixture
def model(tiny_llama):
    torch.manual_seed(0)
    lora = with_lora(tiny_llama(initializer_range=0.3), ["q_proj", "v_proj"], init_lora_weights=False)
    return lora.train()


@pytest.fixture
def trainers(model, chat_tokenizer, tmp_path):
    """Two trainers of one model each, of the same weights: TRL's and ours."""

    def make(**changed):
        settings = {
            "output_dir": str(tmp_path),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "completion_only_loss": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **changed,
        }
        more = {"train_dataset": Dataset.from_list(ROWS), "processing_class": chat_tokenizer}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = SFTConfig(**settings)
            return [one(copy.deepcopy(model), arguments, **more) for one in (SFTTrainer, CompletionTrainer)]

    return make


def gradients(trainer, batch):
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(9))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("more", [{}, {"loss_type": "dft"}, {"gradient_checkpointing": True}, {"packing": True}])
def test_loss_gradients_and_metrics_are_those_of_trl(trainers, more):
    """In float32, of which a unit in the last place is 6e-8 of a number."""
    theirs, ours = trainers(**more)
    assert ours._labels_suffice
    assert ours._beginnings_suffice
    for batch in list(theirs.get_train_dataloader()):
        (loss, grads), (our_loss, our_grads) = gradients(theirs, batch), gradients(ours, batch)
        assert torch.allclose(our_loss, loss, rtol=1e-6, atol=1e-7)
        assert grads.keys() == our_grads.keys() != set()
        for name, grad in grads.items():
            assert torch.allclose(our_grads[name], grad, atol=1e-6), name
        whole, ours_whole = (torch.cat([g.flatten() for g in one.values()]) for one in (grads, our_grads))
        assert (ours_whole - whole).norm() <= 2e-6 * whole.norm()
    assert ours._metrics["train"].keys() == theirs._metrics["train"].keys()
    for name, values in theirs._metrics["train"].items():
        assert ours._metrics["train"][name] == pytest.approx(values, rel=1e-6), name


def test_where_tokens_are_weighed_the_whole_batch_goes_through_the_model(trainers):
    def weigh(gains, places):
        return torch.where(places == 0, 0.25, 1.0).to(gains)

    theirs, ours = trainers()
    batch = next(iter(theirs.get_train_dataloader()))
    seen = []
    for trainer in (theirs, ours):
        with weighed_tokens(trainer.model, headed(trainer.model), weigh):
            seen.append(gradients(trainer, batch)[1])
    model, labels = copy.deepcopy(ours.model), batch["labels"]
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    tokens = answer_tokens(labels)
    (weigh(losses, tokens.places) * losses[tokens.mask]).sum().div(9).backward()
    for name, parameter in model.named_parameters():
        for grads in seen if parameter.grad is not None else ():
            assert torch.allclose(grads[name], parameter.grad, atol=1e-6), name


def test_a_training_takes_the_same_way_and_tells_the_same(trainers):
    theirs, ours = trainers()
    for trainer in (theirs, ours):
        trainer.train()
    for line, our_line in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        assert line.keys() == our_line.keys()
        for name in line.keys() & {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"}:
            assert our_line[name] == pytest.approx(line[name], rel=1e-5), name
    weights = dict(theirs.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        assert torch.allclose(weight, weights[name], atol=1e-6), name


def test_a_batch_without_a_label_gives_a_loss_of_zero_that_can_be_backpropagated(trainers):
    _, ours = trainers()
    batch = next(iter(ours.get_train_dataloader()))
    loss, grads = gradients(ours, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert loss == 0
    assert all(not grad.any() for grad in grads.values())


def test_the_head_sees_labelled_places_alone(trainers):
    theirs, ours = trainers()
    batch = next(iter(theirs.get_train_dataloader()))
    assert (batch["labels"] == -100).any(1).all(), "prompts have no labels"
    whole = ours.model(**batch, fused_lm_head=True)
    with labelled_places(ours.model, batch) as fewer:
        alone = ours.model(**fewer, fused_lm_head=True)
    assert alone.log_probs.shape == (1, int((batch["labels"][:, 1:] != -100).sum()))
    assert torch.allclose(alone.log_probs[0], whole.log_probs[whole.label_mask], atol=1e-6)
    assert ours.model(**batch, fused_lm_head=True).log_probs.shape == whole.log_probs.shape, "outside it is TRL's own"


def test_what_rows_begin_with_goes_through_the_layers_once(trainers):
    theirs, ours = trainers()
    batch = next(iter(theirs.get_train_dataloader()))
    ends = beginning_once(ours.model, batch)
    shared = len(BEGINNING) - 1
    assert ends["past_key_values"].get_seq_length() == shared
    assert ends["input_ids"].tolist() == batch["input_ids"][:, shared:].tolist()
    assert torch.equal(ends["attention_mask"], batch["attention_mask"])
    assert ends["past_key_values"].layers[1].keys.requires_grad, "the beginning learns, too"


@pytest.mark.parametrize("what", ["one row", "other beginnings", "a label", "padding", "positions", "recomputation"])
def test_a_batch_of_which_little_is_shared_stays_whole(trainers, what):
    _, ours = trainers()
    batch = {name: tensor.clone() for name, tensor in next(iter(ours.get_train_dataloader())).items()}
    if what == "one row":
        batch = {name: tensor[:1] for name, tensor in batch.items()}
    elif what == "other beginnings":
        batch["input_ids"][1, 5] = 60
    elif what == "a label":
        batch["labels"][0, 6] = batch["input_ids"][0, 6]
    elif what == "padding":
        batch["attention_mask"][1, :3] = 0
    elif what == "positions":
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    else:
        ours.model.get_base_model().model.layers[0].gradient_checkpointing = True
    whole = beginning_once(ours.model, batch)
    assert whole.keys() == batch.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in batch.items())


def test_where_something_is_dropped_at_random_each_row_draws_its_own(model, trainers, tiny_llama):
    assert not draws_noise(model)
    assert draws_noise(tiny_llama(attention_dropout=0.1))
    noisy = with_lora(tiny_llama(), ["q_proj"], lora_dropout=0.1)
    assert draws_noise(noisy)


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_where_trl_is_another_it_stays_with_trl(trainers, monkeypatch, fault):
    original = labelled_places

    def broken(model, inputs):
        if fault == "raises":
            raise TypeError("forward() got an unexpected keyword argument 'shift_labels'")
        return original(model, {**inputs, "labels": inputs["labels"].flip(1)})

    monkeypatch.setattr(completion_trainer, "labelled_places", broken)
    theirs, ours = trainers()
    assert not ours._labels_suffice
    batch = next(iter(theirs.get_train_dataloader()))
    assert torch.equal(gradients(ours, batch)[0], gradients(theirs, batch)[0])


def test_the_question_leaves_the_model_as_it_was(trainers, model):
    _, ours = trainers()
    state = torch.get_rng_state()
    assert ours.model.training
    assert agrees(ours.model, labelled_places)
    assert ours.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in ours.model.parameters())
    assert not agrees(model, labelled_places), "a model without TRL's fused head"
