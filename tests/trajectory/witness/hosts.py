"""The runs in other hands: TRL's trainer, a tracker, the best model loaded at the end, several batches a step."""

from pathlib import Path

from safemerge_callback import SafeMergeCallback, SafeMergeConfig
from tests.support.trainer import tokens

from . import evidence, training
from .world import SUBSPACE


def sft(world, folder):
    """A run of TRL's SFTTrainer, whose callback takes its settings from a YAML file."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    Path("settings.yaml").write_text(
        f"subspace: {SUBSPACE}\nsafety_adapter: safety\nthreshold: 0.76\nevery: 2\nquiet: true\n", encoding="utf-8"
    )
    config = SafeMergeConfig.from_yaml("settings.yaml")
    recorder = training.Recorder()
    given = training.arguments(folder).to_dict()
    names = ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "use_cpu", "seed")
    asked = {name: given[name] for name in names}
    settings = SFTConfig(**asked, max_length=8, report_to="none", disable_tqdm=True, save_strategy="no", bf16=False)
    with evidence.listening() as said:
        trainer = SFTTrainer(
            world.model(),
            settings,
            train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in tokens()]),
            processing_class=world.tokenizer,
            callbacks=[SafeMergeCallback(config), recorder],
        )
        trainer.train()
        trainer.save_model()
    ours = [line for line in said if "safemerge" in line]
    lines = evidence.journal(f"{folder}/safemerge.jsonl")
    return {"config": config.to_dict(), "factors": recorder.steps, "said": ours, "journal": lines}


def tracked(world, folder):
    """A run under a probe that reports to TensorBoard: what its event files hold."""
    guard = SafeMergeCallback(**training.knobs(gate="calibrated", z_threshold=-0.6))
    training.trained(world, folder, guard, training.probe(world), report_to=["tensorboard"])
    places = sorted({path.parent for path in Path(folder).rglob("*tfevents*")})
    return {place.name if place.name == "safemerge" else "trainer": _events(place) for place in places}


def _events(place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kinds = ("scalars", "tensors", "images", "histograms")
    events = EventAccumulator(str(place), size_guidance=dict.fromkeys(kinds, 0))
    events.Reload()
    tags = events.Tags()
    # The trainer's own text holds the paths and the times of its arguments.
    texts = [tag for tag in tags["tensors"] if "safemerge" in tag]
    steady = [tag for tag in tags["scalars"] if not any(word in tag for word in evidence.CLOCK_WORDS)]
    return {
        "scalars": {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in steady},
        "texts": {tag: [[e.step, str(e.tensor_proto.string_val)] for e in events.Tensors(tag)] for tag in texts},
        "images": {
            t: [[e.step, evidence.sha(e.encoded_image_string)] for e in events.Images(t)] for t in tags["images"]
        },
        "histograms": {
            tag: [[e.step, repr(e.histogram_value)] for e in events.Histograms(tag)] for tag in tags["histograms"]
        },
    }


HOW = {
    "best": {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    },
    "accumulated": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "epochs": {"max_steps": -1, "num_train_epochs": 1},
}
