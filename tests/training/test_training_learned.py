"""`learned` in real trainings: what it does at a check, that resumes agree, and what is refused before a step."""

import pytest
import torch
import torch.distributed as dist

from safemerge_callback import live_factors
from safemerge_callback.errors import ConfigError
from safemerge_callback.signals.coefficients import SearchSettings, learn_weights, search_rows
from tests.support.ranks import run_on
from tests.support.replay import ROWS
from tests.support.trainer import entries, lora_weights
from tests.support.world import World

LEARNED = {"method": "pull", "safety_adapter": None, "data": {"safety_rows": ROWS}}


def trained(world, tokenizer, output, guard, resume=None, callbacks=(), **changed):
    trainer = world.trainer(output, *callbacks, guard, tokenizer=tokenizer, **changed)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("granularity", ["run", "module"])
def test_a_check_pulls_each_module_as_the_search_says(world, chat_tokenizer, tmp_path, monkeypatch, granularity):
    seen = []

    def watched(model, others, rows, settings, **more):
        learned = learn_weights(model, others, rows, settings, **more)
        seen.append(
            {
                n: (one.A.detach().clone(), one.B.detach().clone(), learned.weights[n])
                for n, one in live_factors(model).items()
            }
        )
        return learned

    monkeypatch.setattr("safemerge_callback.signals.module_signals.learned_share.learn_weights", watched)
    guard = world.guard(**LEARNED, learned={"granularity": granularity, "share": 50.0}, until_step=2)
    trainer = trained(world, chat_tokenizer, tmp_path, guard, max_steps=2)
    (before,) = seen
    (check,), (merge,) = entries(tmp_path, "check"), entries(tmp_path, "merge")
    shares = {module["name"]: module["learned_share"] for module in check["modules"]}
    assert max(shares.values()) > 0
    assert merge["learned"] == {"granularity": granularity, "share": 50.0}
    for name, after in live_factors(trainer.model).items():
        A, B, (keep, share) = before[name]
        assert shares[name] == pytest.approx(share)
        assert torch.equal(after.A, A)
        assert torch.allclose(after.B, keep * B, atol=1e-7)


def test_a_resumed_run_ends_as_an_unbroken_one(world, chat_tokenizer, tmp_path):
    how = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    knobs = {**LEARNED, "learned": {"granularity": "module", "share": 5.0}}
    whole = trained(world, chat_tokenizer, tmp_path / "whole", world.guard(**knobs), **how)
    again = trained(
        world,
        chat_tokenizer,
        tmp_path / "whole",
        world.guard(**knobs),
        resume=tmp_path / "whole" / "checkpoint-2",
        **how,
    )
    one, other = lora_weights(whole.model), lora_weights(again.model)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_toward_a_safety_adapter_by_labels(world, chat_tokenizer, tmp_path):
    guard = world.guard(
        method="linear", data={"safety_rows": ROWS}, learned={"objective": "cross_entropy", "share": 5.0}
    )
    trained(world, chat_tokenizer, tmp_path, guard, max_steps=2)
    check = entries(tmp_path, "check")[-1]
    assert len({module["learned_share"] for module in check["modules"]}) == 1
    (merge,) = entries(tmp_path, "merge")
    assert merge["learned"] == {"granularity": "run", "objective": "cross_entropy", "share": 5.0}


@pytest.mark.parametrize(
    ("learned", "words"),
    [({"objective": "js"}, "objective 'js' is unknown"), ({"minimiser": "cma"}, "'cma' is not for one coefficient")],
)
def test_settings_that_cannot_be_are_refused_before_the_first_step(world, chat_tokenizer, tmp_path, learned, words):
    with pytest.raises(ConfigError, match=words):
        trained(world, chat_tokenizer, tmp_path, world.guard(**LEARNED, learned=learned))


def test_a_search_of_an_adapter_that_has_not_moved_is_not_made(world):
    """Before the first step nothing is searched, only checked."""
    from safemerge_callback.signals.check_data import CheckData
    from safemerge_callback.signals.module_signals import MODULE_SIGNALS

    model = world.model()
    data = CheckData(model, factors=live_factors(model), knobs={"learned": {"granularity": "run"}})
    shares = MODULE_SIGNALS["learned_share"].function(data)
    assert shares == dict.fromkeys(live_factors(model), 0.0)
    with pytest.raises(ConfigError, match="there are no task rows"):
        search_rows(model, (), (), SearchSettings())


def two_ranks(folder, output, tokenizer):
    """Each rank trains on rows of its own; both learn of the rows of both, and merge the same."""
    from transformers import AutoTokenizer

    guard = World.load(folder).guard(**LEARNED, learned={"granularity": "block", "share": 5.0, "evaluations": 4})
    trainer = trained(World.load(folder), AutoTokenizer.from_pretrained(tokenizer), output, guard, max_steps=2)
    mine = torch.cat([weight.flatten() for weight in lora_weights(trainer.model).values()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both)


def test_two_ranks_learn_the_same(world, chat_tokenizer, tmp_path):
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    run_on(2, two_ranks, world.folder, tmp_path / "run", tmp_path / "tokenizer")
    (merge,) = entries(tmp_path / "run", "merge")
    assert merge["learned"]["granularity"] == "block"
