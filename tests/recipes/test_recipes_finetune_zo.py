"""MeZO and TeZO: unbiased, back to the bit, alone with their random numbers; and the callback at work under them."""

import copy
import math

import pytest
import torch
import yaml
from datasets import Dataset
from torch import nn
from trl import SFTConfig, SFTTrainer

from recipes.finetune_zo import parse_zo
from recipes.zeroth_order import Directions, ZerothOrder, ZerothOrderSettings, ZerothOrderSteps, ZerothOrderTrainer
from safemerge_callback import SafeMergeCallback
from safemerge_callback.errors import ConfigError
from safemerge_callback.signals.task_rows import TaskRows
from tests.recipes.test_recipes_configs import CONFIGS, files, on_cpu
from tests.support.trainer import defaults, entries, lora_weights, tokens
from tests.support.world import with_lora

# transformers 5.23 calls it activation_checkpointing; trl 1.x, and earlier transformers, know the old name alone
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("method", ["mezo", "tezo"])
def test_of_a_quadratic_the_mean_over_draws_is_the_gradient(method):
    """Of a quadratic both sides give the slope exactly; over 2,000 seeds every entry within 3 standard errors."""
    draws, target = 2000, torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    gradient, estimates = -target, []
    for seed in range(draws):
        optimizer = ZerothOrder([("w", weight)], 0.0, directions=Directions(method, 2, seed), epsilon=1e-2)
        optimizer.probe(lambda: (weight - target).square().sum() / 2, 0)
        z = optimizer._direction("w", weight).double()
        assert optimizer.slope == pytest.approx(float((gradient * z).sum()), abs=1e-9)
        estimates.append(optimizer.slope * z)
    every = torch.stack(estimates)
    error = every.std(0) / math.sqrt(draws)
    assert bool(((every.mean(0) - gradient).abs() < 3 * error).all())


def test_the_covariance_of_tezos_directions_is_the_identity_times_the_rank_before_they_are_scaled():
    draws, weight = 6_000, torch.zeros(2, 2)
    z = torch.stack(
        [
            Directions("tezo", 3, seed).along("w", weight, Directions("tezo", 3, seed).coordinates("w", weight, 0))
            for seed in range(draws)
        ]
    ).flatten(1) * math.sqrt(3)
    products = z[:, :, None] * z[:, None, :]
    off = products.mean(0) - 3 * torch.eye(4)
    assert bool((off.abs() < 3.5 * products.std(0) / math.sqrt(draws)).all())


def test_tezo_goes_through_one_family_and_keeps_a_moment_a_part():
    weight = nn.Parameter(torch.zeros(30, 20))
    optimizer = ZerothOrder([("w", weight)], 0.1, directions=Directions("tezo", 4, 1))
    steps = []
    for step in range(6):
        before = weight.detach().clone()
        optimizer.probe(lambda: (weight - 1).square().sum(), step)
        optimizer.step()
        steps.append((weight.detach() - before).flatten())
    assert int(torch.linalg.matrix_rank(torch.stack(steps))) == 4
    assert {value.numel() for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)} == {4}
    assert not ZerothOrder([("w", weight)], 0.1).state


@pytest.mark.parametrize(("method", "rate"), [("mezo", 0.02), ("tezo", 0.02)])
def test_it_goes_down(method, rate):
    """To the minimum of a quadratic by `mezo`; by `tezo` to what one family of directions reaches of it."""
    target = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(torch.zeros(6, 5))
    optimizer = ZerothOrder([("w", weight)], rate, directions=Directions(method, 8, 1))
    for step in range(300):
        optimizer.probe(lambda: (weight - target).square().sum() / 2, step)
        optimizer.step()
    basis = torch.stack([optimizer.directions.along("w", weight, one) for one in torch.eye(8)]).flatten(1).T
    reach = basis @ torch.linalg.lstsq(basis, target.flatten()[:, None]).solution if method == "tezo" else target
    least = float((reach.flatten() - target.flatten()).square().sum())
    left, start = float((weight.detach() - target).square().sum()), float(target.square().sum())
    assert left - least < 0.05 * (start - least)


@pytest.mark.parametrize("method", ["mezo", "tezo"])
def test_bf16_parameters_come_back_to_the_bit_and_no_other_random_number_is_drawn(method):
    weight = nn.Parameter(torch.randn(40, 30, dtype=torch.bfloat16))
    before, numbers = weight.detach().clone(), torch.get_rng_state()
    optimizer = ZerothOrder([("w", weight)], 0.1, directions=Directions(method))
    seen = []
    optimizer.probe(lambda: seen.append(weight.detach().clone()) or weight.float().sum(), 0)
    assert not any(torch.equal(one, before) for one in seen)
    assert torch.equal(weight, before)

    def fails():
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        optimizer.probe(fails, 0)
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), numbers)


def test_a_slope_that_is_no_number_is_a_step_left_out_and_told_once():
    weight = nn.Parameter(torch.ones(3))
    optimizer = ZerothOrder([("w", weight)], 0.1)
    optimizer.probe(lambda: weight.sum() * math.nan, 0)
    with pytest.warns(UserWarning, match="not finite at step 1, which is left out"):
        optimizer.step()
    # Warnings are errors here: a second one would raise.
    optimizer.probe(lambda: weight.sum() * math.nan, 1)
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))
    optimizer.probe(lambda: weight.sum(), 2)
    optimizer.step()
    assert not torch.equal(weight, torch.ones(3))


def trained(world, output, *callbacks, resume=None, model=None, method="mezo", **changed):
    from transformers import default_data_collator

    trainer = ZerothOrderSteps(
        model if model is not None else world.model(),
        world.settings(output, **{"learning_rate": 1e-3, **changed}),
        train_dataset=tokens(),
        data_collator=default_data_collator,
        callbacks=list(callbacks),
        zeroth_order=ZerothOrderSettings(method),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_accumulated_batches_are_one_batch(world, tmp_path):
    runs = [
        trained(
            world,
            tmp_path,
            learning_rate=1e-2,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        for size in (8, 2)
    ]
    one, other = (lora_weights(run.model) for run in runs)
    start = lora_weights(world.model())
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=3e-5) for name in one)
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 2e-3
    losses = [run.state.log_history[0]["loss"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_both_sides_drop_out_the_same(world, tmp_path):
    """Where the direction is 0 both losses are equal to the bit, with dropout, too, so the slope is 0."""
    model = world.model(lora_dropout=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    trainer = trained(world, tmp_path, model=model, max_steps=1)
    optimizer = trainer.optimizer.optimizer
    optimizer.epsilon = 1e-30
    batch = {key: torch.tensor([row[key] for row in tokens()[:2]]) for key in tokens()[0]}
    first, second = (trainer.training_step(model, dict(batch)).item() for _ in range(2))
    assert optimizer.slope == 0.0
    assert first != second


@pytest.mark.parametrize("method", ["mezo", "tezo"])
def test_the_callback_measures_merges_and_resumes(world, tmp_path, method):
    how = {"method": method, "save_strategy": "steps", "save_steps": 2}
    whole = trained(world, tmp_path / "whole", world.guard(every=3), **how)
    assert [entry["step"] for entry in entries(tmp_path / "whole", "merge")] == [3, 6]
    assert not entries(tmp_path / "whole", "error")
    resumed = trained(
        world, tmp_path / "resumed", world.guard(every=3), resume=str(tmp_path / "whole" / "checkpoint-2"), **how
    )
    assert [entry["step"] for entry in entries(tmp_path / "resumed", "merge")] == [3, 6]
    live = lora_weights(whole.model)
    assert all(torch.equal(weight, live[name]) for name, weight in lora_weights(resumed.model).items())
    plain = trained(world, tmp_path / "plain", **how)
    assert not all(torch.equal(weight, live[name]) for name, weight in lora_weights(plain.model).items())
    watched = trained(world, tmp_path / "watched", world.guard(every=3, gate="watch", safety_adapter=None), **how)
    plain_weights = lora_weights(plain.model)
    assert all(torch.equal(weight, plain_weights[name]) for name, weight in lora_weights(watched.model).items())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fp16": True}, "fp16 is true, and zeroth order has no gradients for its scaler"),
        ({"weight_decay": 0.1}, r"weight_decay is 0\.1, which zeroth order has not"),
    ],
)
def test_what_needs_a_gradient_is_refused_before_the_training(world, tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        trained(world, tmp_path, **settings)


@pytest.mark.parametrize("name", ["replay", "constrained"])
def test_a_correction_of_gradients_is_refused_before_the_training(world, tmp_path, name):
    with pytest.raises(ConfigError, match=f"correction '{name}' is one of gradients, and zeroth order takes none"):
        trained(world, tmp_path, SafeMergeCallback(corrections=[{name: {}}]))


def test_a_method_by_grams_is_refused_before_the_training(world, tmp_path):
    with pytest.raises(ConfigError, match="method 'antidote' goes by the inputs of passes with gradients"):
        trained(world, tmp_path, world.guard(method="antidote", safety_adapter=None))


def test_the_rows_of_the_task_are_seen_once_a_batch(world, tmp_path):
    model, rows = world.model(), TaskRows(100)
    rows.follow(model)
    trained(world, tmp_path, model=model, max_steps=3)
    assert len(rows.rows()) == 6
    assert len(set(rows.rows())) == 6


def test_the_recipes_trainer_counts_each_batch_once(tiny_llama, chat_tokenizer, tmp_path):
    """Two passes a batch: TRL's count of tokens is that of a training by gradients, and so is the first loss."""
    model, logs = with_lora(tiny_llama(), ["q_proj", "v_proj"]), []
    rows = Dataset.from_list(
        [{"input_ids": [1, *range(5, n), 2], "completion_mask": [0] * (n - 4) + [1]} for n in (9, 14, 20, 7)]
    )
    how = {
        "per_device_train_batch_size": 2,
        "completion_only_loss": True,
        "gradient_checkpointing": False,
        "bf16": False,
    }
    for kind in (SFTTrainer, ZerothOrderTrainer):
        settings = SFTConfig(**{**defaults(tmp_path), **how, "max_steps": 2})
        more = {"train_dataset": rows, "processing_class": chat_tokenizer}
        trainer = kind(copy.deepcopy(model), settings, **more)
        trainer.train()
        logs.append(trainer.state.log_history[:2])
    by_gradient, by_slope = logs
    assert [log["num_tokens"] for log in by_slope] == [log["num_tokens"] for log in by_gradient]
    assert by_slope[0]["loss"] == pytest.approx(by_gradient[0]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--zo_method", "mezzo"], "zo_method .*mezzo"),
        (["--zo_epsilon", "0"], r"zo_epsilon is 0\.0: give how far a probe goes"),
        (["--zo_rank", "0"], "zo_rank is 0: give of how many parts"),
    ],
)
def test_bad_settings_are_refused(words, says):
    with pytest.raises(ConfigError, match=says):
        parse_zo(["--output_dir", "out", "--data", "sentiment", "--bf16", "false", "--use_cpu", "true", *words])


@pytest.mark.parametrize("path", files("finetune_zo"), ids=lambda p: p.stem)
def test_the_files_are_those_of_the_recipe(path):
    data, sft, model, safemerge, zo = parse_zo(on_cpu(path))
    assert (data.data, model.use_peft, path.stem) == ("sentiment", True, f"smollm2_sentiment_{zo.method}")
    assert (safemerge.every, sft.max_steps) == (500, 2000)
    assert yaml.safe_load(path.read_text())["base"] == "../finetune/smollm2_sentiment.yaml"
    assert (CONFIGS / "finetune_zo" / path.name).is_file()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epsilon": None}, "zo_epsilon is None: give how far a probe goes"),
        ({"epsilon": True}, "zo_epsilon is True: give how far a probe goes"),
        ({"epsilon": math.nan}, "zo_epsilon is nan: give how far a probe goes"),
        ({"rank": 2.5}, r"zo_rank is 2\.5: give of how many parts"),
        ({"rank": True}, "zo_rank is True: give of how many parts"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, says):
    """A file gives values as they are, whatever the type that is wanted."""
    with pytest.raises(ConfigError, match=says):
        ZerothOrderSettings(**settings)
