"""`t_vaccine`: which layers are drawn, that they alone are trained, and that a resume goes on with them."""

import pytest
import torch

from safemerge_callback import SafeMergeCallback, SafeMergeConfig
from safemerge_callback.corrections.harmful_rows import mean_loss
from safemerge_callback.corrections.perturbed_blocks import attention_blocks
from safemerge_callback.corrections.t_vaccine import STATE_FILE, TVaccine, block_norms, drawn
from safemerge_callback.errors import AdapterError, ConfigError
from safemerge_callback.live.batch_hooks import hooked
from tests.support.rows import rows_of_kinds
from tests.support.trainer import lora_weights

HARMFUL = [{"prompt": "a b c", "response": "w0 w1 yes"}, {"prompt": "d e", "response": "yes w3 w4 w5"}]


def vaccinated(**settings):
    settings = {"rows": HARMFUL, "num_blocks": 1, "batch_size": 2, "share": 0.1, "draw_every": 2, **settings}
    return SafeMergeCallback(corrections=[{"t_vaccine": settings}])


def train(world, chat_tokenizer, output, *guards, **changed):
    trainer = world.trainer(output, *guards, tokenizer=chat_tokenizer, **changed)
    trainer.train()
    return trainer


def test_blocks_are_drawn_by_their_odds_without_replacement():
    norms = [0.1, 0.6, 0.3, 0.0]
    draws = [drawn(norms, 1, f"0 {n}")[0] for n in range(4000)]
    shares = [draws.count(place) / 4000 for place in range(4)]
    assert shares == [pytest.approx(x, abs=0.03) for x in norms]
    assert all(drawn(norms, 3, f"0 {n}") == [0, 1, 2] for n in range(20))
    assert drawn(norms, 4, "0") == [0, 1, 2, 3]
    # As from an urn: the second of two, where the first was the likeliest.
    seconds = [pair for pair in (drawn(norms, 2, f"1 {n}") for n in range(4000)) if 1 in pair]
    wanted = (0.6 * 0.1 / 0.4 + 0.1 * 0.6 / 0.9) / (0.6 + 0.1 * 0.6 / 0.9 + 0.3 * 0.6 / 0.7)
    assert sum(0 in pair for pair in seconds) / len(seconds) == pytest.approx(wanted, abs=0.03)


def test_the_odds_are_the_gradients_by_the_blocks_outputs(world):
    """By a dense perturbation of each block's output along a direction, in float64; the model is left as it was."""
    model, rows = world.model(init_lora_weights=False).double().train(), rows_of_kinds()
    blocks = attention_blocks(model)
    norms = block_norms(model, blocks, rows)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    for norm, block in zip(norms, blocks.values(), strict=True):
        offset = []

        def move(_module, _args, out, offset=offset):
            offset.append(torch.zeros_like(out[0], requires_grad=True))
            return (out[0] + offset[0], *out[1:])

        hook = block.register_forward_hook(move)
        (gradient,) = torch.autograd.grad(mean_loss(model, rows), offset)
        hook.remove()
        assert norm == pytest.approx(float(gradient.norm()), rel=1e-6)


def test_the_drawn_layers_alone_are_trained_and_the_others_are_trainable_again(world, chat_tokenizer, tmp_path, runs):
    before = lora_weights(world.model())
    trainer = train(world, chat_tokenizer, tmp_path, vaccinated(draw_every=100), max_steps=3)
    after = lora_weights(trainer.model)
    moved = {name.split("layers.")[1][0] for name in after if not torch.equal(before[name], after[name])}
    assert len(moved) == 1
    assert all(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" in name)
    figures = runs.entries(tmp_path, "gradient")[-1]["figures"]
    assert figures["rise"] > 0
    assert 0.5 <= figures["odds_max"] < 1


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.*. is deprecated:FutureWarning")
def test_checkpointing_computes_the_same_again(world, chat_tokenizer, tmp_path):
    """To the bit, with accumulation: layers that are spared are so on the way back, too."""
    weights = []
    for checkpointing in (False, True):
        model = world.model(init_lora_weights=False)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        how = {"model": model, "gradient_accumulation_steps": 2, "max_steps": 4}
        weights.append(lora_weights(train(world, chat_tokenizer, tmp_path, vaccinated(), **how).model))
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_resume_goes_on_with_the_same_layers(world, chat_tokenizer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = train(world, chat_tokenizer, tmp_path, vaccinated(), **saving)
    again = world.trainer(tmp_path, vaccinated(), tokenizer=chat_tokenizer, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    one, other = lora_weights(whole.model), lora_weights(again.model)
    assert all(torch.equal(one[name], other[name]) for name in one)
    (tmp_path / "checkpoint-3" / STATE_FILE).write_text("{")
    broken = world.trainer(tmp_path, vaccinated(), tokenizer=chat_tokenizer, **saving)
    with pytest.raises(AdapterError, match="it is not known which layers are trained"):
        broken.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("another", [False, True], ids=["same trainer", "another"])
def test_after_an_error_all_layers_are_trained_again(world, chat_tokenizer, tmp_path, monkeypatch, another):
    """Whichever training is next: with the same callback, or a merge's alone, of another trainer on the same model."""
    trainer = world.trainer(tmp_path / "broken", vaccinated(draw_every=100), tokenizer=chat_tokenizer)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *batch, **more: [compute_loss(*batch, **more)][1]
    with pytest.raises(IndexError):
        trainer.train()
    model, before = trainer.model, lora_weights(trainer.model)
    trainer.compute_loss = compute_loss
    if another:
        trainer = world.trainer(tmp_path / "next", world.guard(every=2), model=model, max_steps=2)
    else:
        corrections = []
        enter = TVaccine.batches
        monkeypatch.setattr(TVaccine, "batches", lambda self, at: corrections.append(self) or enter(self, at))
    trainer.train()
    if another:
        after = lora_weights(model)
        assert all(not torch.equal(before[name], after[name]) for name in after if "lora_B" in name)
    else:
        assert len(corrections[-1].blocks) == 2
    assert not hooked(model)


def test_what_it_refuses(world, chat_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="correction 't_vaccine': rows are missing"):
        SafeMergeConfig(corrections=[{"t_vaccine": {}}])
    with pytest.raises(ConfigError, match="draw_every is 0: give a whole number of 1 or more"):
        vaccinated(draw_every=0)
    with pytest.raises(ConfigError, match="num_blocks is 8, and 2 attention blocks are in layers that are trained"):
        train(world, chat_tokenizer, tmp_path, vaccinated(num_blocks=8))
