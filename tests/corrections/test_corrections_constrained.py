"""`constrained`: weights by central differences, the gradient by autograd of the paper's loss, real trainings."""

import copy
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from safemerge_callback import SafeMergeCallback
from safemerge_callback.corrections.constrained import (
    ConstrainedSettings,
    constrained_losses,
    token_weights,
)
from safemerge_callback.corrections.token_weights import weighed_tokens
from safemerge_callback.errors import ConfigError
from safemerge_callback.live.batch_hooks import hooked
from safemerge_callback.signals.adapter_off import adapter_off
from safemerge_callback.signals.token_gains import answer_tokens, headed
from tests.support.trainer import defaults

BETAS = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1)


def betas_at(places):
    return torch.tensor(BETAS, dtype=torch.float64)[places.clamp(max=len(BETAS) - 1)]


def weigh(gains, places):
    return token_weights(gains, betas_at(places))


def trained(world, **lora):
    """A model in float64 that has left the reference."""
    model = world.model(**lora).double().train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def near(one, other, tolerance):
    whole = math.sqrt(sum(float(g.square().sum()) for g in other.values()))
    apart = math.sqrt(sum(float((one[name] - g).square().sum()) for name, g in other.items()))
    assert one.keys() == other.keys()
    return apart <= tolerance * whole


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_weights_are_the_slope_of_the_papers_loss(beta):
    gains = torch.linspace(-6, 6, 49, dtype=torch.float64)
    betas, h = torch.full_like(gains, beta), 1e-5
    paper = -(2 / beta) * torch.nn.functional.logsigmoid(beta * gains)
    assert torch.allclose(constrained_losses(gains, betas), paper - 2 / beta * math.log(2), atol=1e-12)
    slope = (constrained_losses(gains + h, betas) - constrained_losses(gains - h, betas)) / (2 * h)
    assert torch.allclose(-slope, token_weights(gains, betas), atol=1e-9)


def test_the_weight_is_1_at_the_reference_and_half_at_log_3_over_beta():
    betas = torch.tensor(BETAS, dtype=torch.float64)
    assert torch.equal(token_weights(torch.zeros_like(betas), betas), torch.ones_like(betas))
    assert torch.allclose(token_weights(math.log(3) / betas, betas), torch.full_like(betas, 0.5))
    gains = torch.tensor([-5.0, 0.3, 40.0], dtype=torch.float64)
    assert torch.equal(token_weights(gains, torch.zeros_like(gains)), torch.ones_like(gains))
    assert torch.equal(constrained_losses(gains, torch.zeros_like(gains)), -gains)


def test_an_answer_is_a_run_of_labels_on_either_side_of_padding_and_in_packed_rows():
    X = -100
    labels = torch.tensor([[X, X, 5, 6, 7, X, X], [X, X, X, X, X, 8, 9], [4, 5, X, X, 6, 7, X]])
    tokens = answer_tokens(labels)
    assert tokens.targets.tolist() == [5, 6, 7, 8, 9, 5, 6, 7]
    assert tokens.places.tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    packed, positions = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert answer_tokens(packed, positions).places.tolist() == [0, 1, 0, 1, 2]
    assert answer_tokens(torch.full((1, 4), X)).targets.tolist() == []


def batch(side):
    rng = torch.Generator().manual_seed(9)
    rows = [torch.randint(3, 64, (length,), generator=rng).tolist() for length in (12, 7, 9)]
    asked = [3, 2, 4]
    longest, batch = max(map(len, rows)), {"input_ids": [], "attention_mask": [], "labels": []}
    for row, n in zip(rows, asked, strict=True):
        pad = longest - len(row)
        columns = {"input_ids": (row, 0), "attention_mask": ([1] * len(row), 0)}
        columns["labels"] = ([-100] * n + row[n:], -100)
        for name, (values, filler) in columns.items():
            batch[name].append(values + [filler] * pad if side == "right" else [filler] * pad + values)
    inputs = {name: torch.tensor(values) for name, values in batch.items()}
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def packed():
    """The same rows in one, without padding, told by their positions."""
    padded = batch("right")
    whole = padded["attention_mask"].bool()
    inputs = {name: padded[name][whole].unsqueeze(0) for name in ("input_ids", "labels", "position_ids")}
    first = inputs["position_ids"] == 0
    return {**inputs, "labels": inputs["labels"].masked_fill(first, -100)}


def papers_loss(model, inputs):
    """The mean over the answers' tokens, with a whole model's logits for each of the two."""
    labels = inputs["labels"][:, 1:]
    asks = {name: value for name, value in inputs.items() if name != "labels"}

    def log_probs():
        logits = model(**asks).logits[:, :-1].log_softmax(-1)
        return logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)

    with torch.no_grad(), adapter_off(model):
        reference = log_probs()
    tokens = answer_tokens(inputs["labels"], inputs["position_ids"])
    gains = (log_probs() - reference)[tokens.mask]
    betas = betas_at(tokens.places)
    return (-(2 / betas) * torch.nn.functional.logsigmoid(betas * gains)).mean()


@pytest.mark.parametrize("inputs", [batch("right"), batch("left"), packed()], ids=["right", "left", "packed"])
def test_the_gradient_is_that_of_the_papers_loss(world, inputs):
    model = trained(world)
    papers_loss(model, inputs).backward()
    want = gradients(model)
    model.zero_grad()
    plain = cross_entropy(model, inputs)
    with weighed_tokens(model, headed(model), weigh):
        loss = cross_entropy(model, inputs)
        loss.backward()
        assert hooked(model)
    assert torch.equal(loss, plain), "what is logged is the task's own loss"
    assert near(gradients(model), want, 1e-10)
    assert not hooked(model)
    assert not near(want, sft(model, inputs), 0.1)


def cross_entropy(model, inputs):
    """The model's own loss, but in float64."""
    logits, labels = model(**inputs).logits[:, :-1], inputs["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)


def sft(model, inputs):
    model.zero_grad()
    cross_entropy(model, inputs).backward()
    return gradients(model)


def test_dropout_is_off_for_the_reference_and_its_random_numbers_are_the_tasks(world):
    inputs = batch("right")
    model = trained(world, lora_dropout=0.5)
    torch.manual_seed(1)
    want = sft(model, inputs)
    after = torch.get_rng_state()
    seen = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(1)
        with weighed_tokens(model, headed(model), lambda gains, places: seen.append(gains) or torch.ones_like(gains)):
            cross_entropy(model, inputs).backward()
        assert torch.equal(torch.get_rng_state(), after)
        assert same(gradients(model), want), "weights of 1 are absence"
    assert torch.equal(*seen)
    assert all(module.training for module in model.modules())


def test_a_batch_whose_reference_fails_goes_unweighed_and_says_so(world, monkeypatch):
    inputs, model = batch("right"), trained(world)
    want = sft(model, inputs)
    model.zero_grad()
    parts = headed(model)
    monkeypatch.setattr(parts.backbone, "forward", once(parts.backbone.forward))
    with weighed_tokens(model, parts, weigh) as faults:
        cross_entropy(model, inputs).backward()
    assert ["no room" in fault.error for fault in faults] == [True]
    assert same(gradients(model), want)


def once(forward):
    fails = iter([True])

    def failing(*args, **kwargs):
        if next(fails, False):
            raise RuntimeError("no room")
        return forward(*args, **kwargs)

    return failing


class Gradients(TrainerCallback):
    """The gradients of each step as the optimizer gets them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients(model))


ROWS = [
    {name: batch("right")[name][i % 3].tolist() for name in ("input_ids", "attention_mask", "labels")}
    for i in (0, 1, 2, 1, 0, 2, 2, 1)
]


def train(world, output, listed, model=None, **changed):
    seen = Gradients()
    guard = [SafeMergeCallback(corrections=listed)] if listed else []
    settings = TrainingArguments(**{**defaults(output), "max_grad_norm": 0.0, **changed})
    model = world.model() if model is None else model
    trainer = Trainer(model, settings, train_dataset=ROWS, callbacks=[*guard, seen])
    trainer.train()
    return trainer, seen.steps


def test_the_first_step_is_supervised_fine_tunings_to_the_bit(world, tmp_path, runs):
    _, plain = train(world, tmp_path / "plain", None, max_steps=2)
    _, ours = train(world, tmp_path / "ours", [{"constrained": {}}], max_steps=2)
    assert same(ours[0], plain[0])
    assert not same(ours[1], plain[1])
    first, second = runs.entries(tmp_path / "ours", "gradient")
    assert (first["loss"], first["figures"]["token_weight"], first["figures"]["first_gain"]) == (0.0, 1.0, 0.0)
    assert second["correction"] == "constrained"
    assert 0 < second["figures"]["first_weight"] <= second["figures"]["token_weight"] < 1
    assert second["seconds"] > 0


def test_at_the_end_alone_it_is_in_the_last_step(world, tmp_path, runs):
    listed = [{"constrained": {"every": 0, "at_train_end": True}}]
    _, plain = train(world, tmp_path / "plain", None, max_steps=3)
    _, ours = train(world, tmp_path / "ours", listed, max_steps=3)
    assert [same(*pair) for pair in zip(ours, plain, strict=True)] == [True, True, False]
    assert [entry["step"] for entry in runs.entries(tmp_path / "ours", "gradient")] == [3]


def test_four_batches_of_two_are_one_of_eight(world, tmp_path):
    """Answers are of several lengths, so a mean over each batch would not be the mean over all."""
    model = trained(world).float()
    seen = []
    for name, sizes in {"one": (8, 1), "four": (2, 4)}.items():
        how = {"per_device_train_batch_size": sizes[0], "gradient_accumulation_steps": sizes[1], "max_steps": 1}
        seen += train(world, tmp_path / name, [{"constrained": {}}], copy.deepcopy(model), **how)[1]
    assert near(*seen, 1e-5)


def test_steps_that_are_not_due_are_left_alone(world, tmp_path):
    _, plain = train(world, tmp_path / "plain", None, max_steps=3)
    guard = [{"constrained": {"from_step": 3}}]
    trainer, ours = train(world, tmp_path / "ours", guard, max_steps=3, save_strategy="steps", save_steps=2)
    assert [same(*pair) for pair in zip(ours, plain, strict=True)] == [True, True, False]
    assert not trainer.model._forward_pre_hooks


def test_without_labels_it_is_refused_before_anything_was_trained(world, tmp_path):
    with pytest.raises(ConfigError, match="gives its model no labels"):
        train(world, tmp_path, [{"constrained": {}}], label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("betas", "words"),
    [
        ([], "give a list of numbers of 0 or more"),
        (0.5, "give a list of numbers of 0 or more"),
        ([0.5, -1], "give a list of numbers of 0 or more"),
        ([0, 0.0], "which binds nothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(betas, words):
    with pytest.raises(ConfigError, match=words):
        ConstrainedSettings(betas=betas)


def test_a_head_that_is_trained_and_logits_that_are_scaled_are_refused(world, monkeypatch):
    with pytest.raises(ConfigError, match="the language head is trained"):
        headed(world.model(targets=["q_proj", "lm_head"]))
    model = world.model()
    causal = model.get_base_model()
    forward = causal.forward

    def softened(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 4
        return outputs

    monkeypatch.setattr(causal, "forward", softened)
    causal.get_output_embeddings().weight.data.mul_(20)
    with pytest.raises(ConfigError, match="changes the logits of its head"):
        headed(model)
    with pytest.raises(ConfigError, match="no decoder with a language head"):
        headed(torch.nn.Linear(2, 2))
