"""What each process of `regmean`'s engine test runs: short trainings by plain SGD with merges by Grams.

    main(WORLD, OUT, ENGINE...)

OUT holds the `tokenizer`. Each process writes OUT/<engine>-rank<n>.pt: the factors after each step; the words for
gate `safety_slope`, under OUT/<engine>-slope-rank<n>.pt, where the engine's name has `-slope` behind it.
"""

import torch
import transformers
from transformers import AutoTokenizer

from safemerge_callback.errors import ConfigError
from tests.support.replay import ROWS
from tests.trajectory.engines.gradient import Steps
from tests.trajectory.engines.run import RANK, check_marks, each_of, forget, settings

KNOBS = {"safety_adapter": None, "every": 2, "data": {"safety_rows": ROWS, "gram_rows": 32}}
STEPS, RATE = 6, 0.2


def run(world, job, out):
    engine, _, slope = job.partition("-")
    transformers.set_seed(3)
    steps = Steps()
    guard = world.guard(**KNOBS, **({"gate": "safety_slope"} if slope else {"method": "regmean"}))
    plain_sgd = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    changed = {**plain_sgd, "max_steps": STEPS, "average_tokens_across_devices": False, **settings(engine, "fp32")}
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    model = world.model(init_lora_weights=False)
    trainer = world.trainer(out / job, guard, steps, model=model, tokenizer=tokenizer, **changed)
    try:
        trainer.train()
        check_marks(steps.model, engine)
        result = {"steps": steps.steps}
    except ConfigError as error:
        result = {"refused": str(error), "steps": steps.steps}
    torch.save(result, out / f"{job}-rank{RANK}.pt")
    trainer.accelerator.free_memory()
    forget()


def main(folder, out, *jobs):
    """What each process runs."""
    each_of(run, folder, out, jobs)
