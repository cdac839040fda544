"""What modules are given: the sample of a run's own batches, and one pass over rows, against the inputs themselves."""

import gc

import pytest
import torch

from safemerge_callback.live.modules import lora_layers
from safemerge_callback.signals.row_inputs import row_inputs
from safemerge_callback.signals.task_inputs import EACH, TaskInputs, joined
from tests.support.rows import rows_of_kinds


def inputs_of(model, action):
    """Each module's inputs, (b, t, d), in the calls of `action`, by a hook of the test's own."""
    seen = {name: [] for name in lora_layers(model)[1]}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name, layer in lora_layers(model)[1].items()
    ]
    action()
    for handle in handles:
        handle.remove()
    return seen


def trained_on(model, *batches):
    return inputs_of(model, lambda: [model(**batch) for batch in batches])


def batch(seed=0, shape=(2, 7), padding=0):
    ids = torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, shape[1] - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_a_small_batch_is_kept_whole_but_for_its_padding(world):
    model = world.model(init_lora_weights=False, lora_dropout=0.5).train()
    rows = TaskInputs(64)
    rows.follow(model)
    one, two = batch(1, padding=3), batch(2)
    seen = trained_on(model, one, two)
    factors = joined([rows.inputs()])
    assert factors.keys() == lora_layers(model)[1].keys()
    for name, factor in factors.items():
        X = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen[name], (one, two), strict=True)])
        assert torch.allclose(factor.mT @ factor, X.mT @ X / len(X), rtol=1e-4, atol=1e-5)
    # q and v of a layer are given one tensor, and share its rows
    assert len(rows.samples) == 2
    assert factors["layers.0.self_attn.q_proj"] is factors["layers.0.self_attn.v_proj"]


def test_of_a_large_batch_places_are_drawn_without_a_random_number_and_the_last_batches_stay(world):
    model = world.model(init_lora_weights=False).train()
    rows = TaskInputs(2 * EACH)
    rows.follow(model)
    state = torch.get_rng_state()
    places = []
    for seed in range(4):
        model(**batch(seed, (4, 40)))
        places.append(rows.samples["layers.0.self_attn.q_proj"][-1])
    assert torch.equal(state, torch.get_rng_state())
    assert [len(one) for one in rows.weights] == [EACH, EACH]
    assert all(len(kept) == 2 for kept in rows.samples.values())
    assert torch.equal(rows.samples["layers.0.self_attn.q_proj"][0], places[2])


def test_what_comes_after_a_cache_is_masked_by_the_end_of_the_mask(world):
    model = world.model(init_lora_weights=False).train()
    rows = TaskInputs(64)
    one = batch(1, padding=3)
    cache = model(input_ids=one["input_ids"][:, :2], use_cache=True).past_key_values
    rows.follow(model)
    model(input_ids=one["input_ids"][:, 2:], attention_mask=one["attention_mask"], past_key_values=cache)
    assert rows.inputs().counted == 7.0


def test_only_what_is_trained_on_counts_however_often_it_is_computed(world):
    model = world.model(init_lora_weights=False).train()
    model.enable_input_require_grads()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    rows = TaskInputs(64)
    rows.follow(model)
    one = batch(1)
    model(**one, labels=one["input_ids"]).loss.backward()
    with torch.no_grad():
        model(**batch(2))
    with rows.unseen():
        model(**batch(3))
    model.eval()(**batch(4))
    with pytest.raises(IndexError):
        model.train()(input_ids=torch.full((1, 3), 99))
    assert rows.seen == 1
    assert {len(kept) for kept in rows.samples.values()} == {1}
    model(**batch(5))
    assert rows.seen == 2
    assert rows.inputs().counted == 28.0


def test_what_a_checkpoint_holds_goes_on(world):
    model = world.model(init_lora_weights=False).train()
    rows = TaskInputs(64)
    rows.follow(model)
    model(**batch(1))
    again = TaskInputs(64)
    again.restore(rows.state, torch.device("cpu"))
    again.follow(model)
    model(**batch(2))
    one, other = joined([rows.inputs()]), joined([again.inputs()])
    assert all(torch.equal(one[name], other[name]) for name in one)
    del rows, again
    gc.collect()
    model(**batch(3))


def test_the_rows_of_many_processes_are_one_mean(world):
    model = world.model(init_lora_weights=False).train()
    parts = []
    for seed, padding in ((1, 0), (2, 4)):
        rows = TaskInputs(64)
        rows.follow(model)
        model(**batch(seed, padding=padding))
        parts.append(rows.inputs())
        del rows
    together = joined(parts)["layers.0.self_attn.q_proj"]
    sums = [part.rows["layers.0.self_attn.q_proj"] for part in parts]
    assert torch.allclose(together.mT @ together, sum(x.mT @ x for x in sums) / (14 + 10), rtol=1e-5)
    assert joined([TaskInputs(4).inputs()]) == {}


@pytest.mark.parametrize("whole", [False, True])
def test_rows_are_read_from_the_prompts_end_on(world, whole):
    model, rows = world.model(init_lora_weights=False).train(), rows_of_kinds()
    factors = row_inputs(model, rows, whole=whole, batch_size=3)
    assert model.training
    for name, factor in factors.items():
        parts = []
        for row in rows:
            with torch.no_grad():
                ids = torch.tensor([[*row.prompt, *row.response[:-1]]])
                (x,) = inputs_of(model.eval(), lambda ids=ids: model(input_ids=ids))[name]
            parts.append(x[0] if whole else x[0, -len(row.response) :])
        model.train()
        X = torch.cat(parts)
        assert factor.shape == X.shape
        assert torch.allclose(factor.mT @ factor, X.mT @ X / len(X), rtol=1e-4, atol=1e-5)
