"""The checks behind the table can fail: each notices a callback that does the wrong thing."""

from dataclasses import replace

import torch
from transformers import TrainerCallback

from benchmarks.trainers import data
from benchmarks.trainers.cell import TrainerCell, run
from benchmarks.trainers.setups import plain


class Meddler(TrainerCallback):
    """Does `act(parameters)` right after the callback at step 1, as if the callback had done it."""

    def __init__(self, act):
        self.act = act

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            with torch.no_grad():
                self.act(dict(model.named_parameters()))


def meddled(act, **lora):
    def make(base, output, callbacks):
        look, *rest = callbacks
        # Alone, without ours in between, there is nothing to meddle with.
        inside = [*rest[:-1], Meddler(act)] if len(rest) > 1 else []
        return plain(data.tokens, **lora)(base, output, [look, *inside, rest[-1]])

    return TrainerCell("test", "meddled", make)


def factor(parameters, letter="B"):
    return next(p for n, p in parameters.items() if f"lora_{letter}.default" in n)


def test_a_base_weight_that_moves_is_noticed(bases, tmp_path):
    outcome = run(meddled(lambda p: next(iter(p.values())).add_(1.0)), bases("llama"), tmp_path)
    assert outcome.status == "FAILS"
    assert "changed besides the trained adapter" in outcome.why


def test_a_merge_off_by_a_thousandth_is_noticed(bases, tmp_path):
    outcome = run(meddled(lambda p: factor(p).mul_(1.001)), bases("llama"), tmp_path)
    assert outcome.status == "FAILS"
    assert "from the formula" in outcome.why


def test_a_save_of_other_weights_is_noticed(bases, tmp_path):
    cell = meddled(lambda p: None)

    def make(base, output, callbacks):
        setup = cell.make(base, output, callbacks)

        def save(trainer, folder):
            trainer.save_model(folder)
            with torch.no_grad():
                factor(dict(trainer.model.named_parameters())).add_(1e-3)

        return replace(setup, save=save)

    outcome = run(replace(cell, make=make), bases("llama"), tmp_path)
    assert outcome.status == "FAILS"
    assert "saved factors differ" in outcome.why


def test_a_check_that_is_not_in_the_journal_is_noticed(bases, tmp_path):
    cell = meddled(lambda p: None)
    outcome = run(replace(cell, knobs={"every": 2}), bases("llama"), tmp_path)
    assert outcome.status == "FAILS"
    assert "check entries at [2, 3]" in outcome.why


def test_a_trainer_that_fails_alone_is_not_blamed_on_the_callback(bases, tmp_path):
    outcome = run(TrainerCell("test", "broken", plain(list)), bases("llama"), tmp_path)
    assert outcome.status == "unavailable"


def test_other_weights_than_the_expected_are_noticed(bases, tmp_path):
    outcome = run(replace(meddled(lambda p: None), knobs={"weights": [0.7, 0.3]}), bases("llama"), tmp_path)
    assert outcome.status == "FAILS"
    assert "from the formula" in outcome.why
