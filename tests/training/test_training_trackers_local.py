"""TensorBoard, trackio and MLflow, each writing to a local folder."""

import contextlib
import io
import json
import os
import sqlite3
import warnings
from pathlib import Path

import pytest
from transformers import TrainerCallback

from safemerge_callback.decision import BAND
from safemerge_callback.record import METRICS
from safemerge_callback.training.trackers import Report, Run, Trackers
from tests.support.metrics import EVERY_CHECK
from tests.support.replay import replaying

# What gate all sends: it merges below no cosine.
SENT = EVERY_CHECK - {"safemerge/modules_below"}


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    return events


def scalars(folder):
    events = read_events(folder)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def picture_of(data):
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def test_tensorboard_scalars_read_back(world, runs, tmp_path):
    world.trainer(tmp_path, world.guard(every=3), report_to=["tensorboard"]).train()
    (run,) = (tmp_path / "runs").iterdir()
    assert [step for step, _ in scalars(run)["train/loss"]] == [1, 2, 3, 4, 5, 6]
    ours = scalars(run / "safemerge")
    assert ours.keys() == SENT
    lowest = [(e["step"], min(m["cosine"] for m in e["modules"])) for e in runs.entries(tmp_path, "check")]
    assert ours["safemerge/cosine_min"] == [(step, pytest.approx(value)) for step, value in lowest]


def test_tensorboard_histogram_picture_alert_and_config_read_back(world, runs, tmp_path):
    guard = world.guard(gate="threshold", threshold=1.0, every=1)
    world.trainer(tmp_path, guard, report_to=["tensorboard"]).train()
    (run,) = (tmp_path / "runs").iterdir()
    events = read_events(run / "safemerge")
    spread = events.Histograms("safemerge/cosines")
    assert [(e.step, e.histogram_value.num) for e in spread] == [(step, 4) for step in range(1, 7)]
    last = [m["cosine"] for m in runs.entries(tmp_path, "check")[-1]["modules"]]
    assert spread[-1].histogram_value.sum == pytest.approx(sum(last))
    pictures = events.Images("safemerge/heat_map")
    assert [e.step for e in pictures] == [1, 2, 4, 6]
    colours = {c for _, c in picture_of(pictures[-1].encoded_image_string).getcolors(1 << 20)}
    assert (214, 39, 40) in colours  # the line of the threshold
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "4 of 4 modules at step 1" in texts["safemerge/alert/text_summary"]
    assert '"threshold": 1.0' in texts["safemerge/config/text_summary"]


def test_a_run_that_goes_back_along_the_alignment_alerts_at_each_crossing(tmp_path):
    trackers = Trackers()
    trackers.attach(["tensorboard"], Run(tmp_path, {}))
    # the mean, and whether a person is told: not again before it has come half way back
    heard = [(-0.1, 0), (BAND.edge, 0), (-0.6, 1), (-0.9, 0), (-0.4, 0), (-0.7, 0), (-0.2, 0), (None, 0), (-0.8, 1)]
    for step, (moved, _) in enumerate(heard, 1):
        trackers.check(["tensorboard"], Report(step, {} if moved is None else {"safemerge/moved_mean": moved}))
    trackers.close()
    events = read_events(tmp_path / "runs" / "safemerge")
    told = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("safemerge/alert/text_summary")]
    assert [step for step, _ in told] == [step for step, (_, due) in enumerate(heard, 1) if due]
    assert "moved_mean is -0.60 at step 3, below -0.55, where 19 of 21 runs of a 135M model refused less" in told[0][1]


@pytest.fixture
def quiet():
    """Third parties' warnings on import and of their database are none of ours; ours still are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="safemerge")
        yield


def test_trackio_run_read_back(world, tmp_path, quiet):
    pytest.importorskip("trackio")
    guard = world.guard(gate="threshold", threshold=1.0, every=3)
    world.trainer(tmp_path / "out", guard, report_to=["trackio"], project="watched").train()
    folder = Path(os.environ["TRACKIO_DIR"])
    with contextlib.closing(sqlite3.connect(folder / "watched.db")) as database:
        rows = [json.loads(blob) for (blob,) in database.execute("select metrics from metrics order by id")]
        (config,) = [json.loads(blob) for (blob,) in database.execute("select config from configs")]
        alerts = list(database.execute("select title, text from alerts"))
    ours = [row for row in rows if "safemerge/modules" in row]
    assert [(row["train/global_step"], row["safemerge/modules_merged_total"]) for row in ours] == [(3, 4.0), (6, 8.0)]
    assert [row.keys() & METRICS.keys() for row in ours] == [EVERY_CHECK] * 2
    assert [sum(row["safemerge/cosines"]["values"]) for row in ours] == [4, 4]
    assert len([row for row in rows if "train/loss" in row]) == 6
    pictures = [row["safemerge/heat_map"] for row in rows if "safemerge/heat_map" in row]
    assert [p["_type"] for p in pictures] == ["trackio.image"] * 2
    (found,) = folder.glob(f"**/{Path(pictures[-1]['file_path']).name}")
    assert picture_of(found.read_bytes()).size[0] > 100
    assert config["safemerge"] == guard.config.to_publish()
    assert [title for title, _ in alerts] == ["safemerge: a module fell below the gate"]


def test_trackio_keeps_the_files_of_a_run_that_the_trainer_has_ended(world, tmp_path, quiet):
    trackio = pytest.importorskip("trackio")
    live = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            live.append(trackio.context_vars.current_run.get().id)

    world.trainer(tmp_path / "out", world.guard(every=3), Look(), report_to=["trackio"], project="kept").train()
    assert trackio.context_vars.current_run.get() is None
    reader = trackio.init(project="kept")
    folder = Path(reader.use_artifact(f"safemerge-{live[0]}", type="safemerge").download(str(tmp_path / "down")))
    trackio.finish()
    there = {path.name for path in folder.iterdir()}
    assert there == {"README.md", "adapter_config.json", "adapter_model.safetensors", "plan.txt", "safemerge.jsonl"}
    assert (folder / "safemerge.jsonl").read_bytes() == (tmp_path / "out" / "safemerge.jsonl").read_bytes()


@pytest.fixture
def mlflow(monkeypatch, tmp_path, mlflow_store, quiet):
    found = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    monkeypatch.chdir(tmp_path)
    yield found
    while found.active_run():
        found.end_run()


def test_mlflow_metrics_read_back(world, tmp_path, mlflow):
    mlflow.set_experiment(tmp_path.name)
    with mlflow.start_run() as run:
        world.trainer(tmp_path / "out", world.guard(every=3), report_to=["mlflow"]).train()
    client = mlflow.MlflowClient()
    for key in SENT:
        assert [m.step for m in client.get_metric_history(run.info.run_id, key)] == [3, 6], key
    total = client.get_metric_history(run.info.run_id, "safemerge/modules_merged_total")
    assert [m.value for m in total] == [4, 8]


def test_mlflow_artifacts_land_in_the_run_that_the_trainer_has_ended(world, runs, tmp_path, mlflow):
    guard = world.guard(gate="threshold", threshold=1.0, every=3)
    trainer = world.trainer(tmp_path / "out", guard, report_to=["mlflow"])
    trainer.train()
    assert mlflow.active_run() is None
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id])
    assert run.info.status == "FINISHED"
    folder = Path(client.download_artifacts(run.info.run_id, "safemerge"))
    kept = {path.name: path for path in folder.iterdir()}
    assert kept.keys() == {
        "config.json", "heat_map.png", "safemerge.jsonl", "plan.txt", "README.md", "adapter_config.json",
        "adapter_model.safetensors",
    }  # fmt: skip
    assert json.loads(kept["config.json"].read_text()) == guard.config.to_publish()
    assert kept["safemerge.jsonl"].read_text() == (tmp_path / "out" / "safemerge.jsonl").read_text()
    assert picture_of(kept["heat_map.png"].read_bytes()).size[0] > 100
    weights = runs.saved_weights(folder)
    live = runs.lora_weights(trainer.model)
    assert len(weights) == len(live)
    assert all((w == live[name.replace(".weight", ".default.weight")]).all() for name, w in weights.items())
    assert run.data.tags["safemerge.alert"].startswith("safemerge: a module fell below the gate: 4 of 4 modules")


# What a run that only replays sends at each log: three rows a time, so that every kind comes.
HELD = {
    f"safemerge/corrections/replay/{figure}"
    for figure in ("loss", "seconds", "norm", "cosine", "loss_harm", "loss_benign", "rows", "interval")
}


def replays(world, chat_tokenizer, folder, tracker, **more):
    """A run without checks that reports to a tracker at steps 2, 4 and 6; the losses that its journal has by step."""
    trainer = world.trainer(
        folder, replaying(batch_size=3), tokenizer=chat_tokenizer, logging_steps=2, report_to=[tracker], **more
    )
    trainer.train()
    entries = [json.loads(line) for line in (folder / "safemerge.jsonl").read_text().splitlines()]
    assert {entry["kind"] for entry in entries} == {"start", "gradient", "end"}
    return {entry["step"]: entry["loss"] for entry in entries if entry["kind"] == "gradient"}


def test_tensorboard_has_the_figures_of_a_run_without_checks(world, chat_tokenizer, tmp_path):
    losses = replays(world, chat_tokenizer, tmp_path, "tensorboard")
    (run,) = (tmp_path / "runs").iterdir()
    events = read_events(run / "safemerge")
    ours = scalars(run / "safemerge")
    assert ours.keys() == HELD
    assert dict(ours["safemerge/corrections/replay/loss"]) == pytest.approx(losses, rel=1e-5)
    assert [step for step, _ in ours["safemerge/corrections/replay/rows"]] == [2, 4, 6]
    assert (events.Tags()["images"], events.Tags()["histograms"]) == ([], [])
    assert '"replay"' in events.Tensors("safemerge/config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_trackio_has_the_figures_of_a_run_without_checks(world, chat_tokenizer, tmp_path, quiet):
    pytest.importorskip("trackio")
    losses = replays(world, chat_tokenizer, tmp_path, "trackio", project="held")
    with contextlib.closing(sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "held.db")) as database:
        rows = [json.loads(blob) for (blob,) in database.execute("select metrics from metrics order by id")]
    ours = [row for row in rows if HELD & row.keys()]
    assert {row["train/global_step"]: row["safemerge/corrections/replay/loss"] for row in ours} == losses
    assert all(row.keys() >= HELD and not SENT & row.keys() for row in ours)
    assert not [key for row in rows for key in row if "heat_map" in key or "cosines" in key]


def test_mlflow_has_the_figures_of_a_run_without_checks(world, chat_tokenizer, tmp_path, mlflow):
    losses = replays(world, chat_tokenizer, tmp_path / "out", "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id])
    for key in HELD:
        assert [m.step for m in client.get_metric_history(run.info.run_id, key)] == [2, 4, 6], key
    logged = client.get_metric_history(run.info.run_id, "safemerge/corrections/replay/loss")
    assert [m.value for m in logged] == list(losses.values())
    folder = Path(client.download_artifacts(run.info.run_id, "safemerge"))
    names = {"config.json", "safemerge.jsonl", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    assert "| replay | in 6 steps |" in (folder / "README.md").read_text()
    assert "gate" not in json.loads((folder / "config.json").read_text())
    assert "safemerge.alert" not in run.data.tags


def test_nothing_is_tracked_where_the_trainer_does_not_report(world, tmp_path):
    world.trainer(tmp_path, world.guard()).train()
    assert {p.name for p in Path(tmp_path).iterdir()} == {"_pre_merge", "safemerge.jsonl", "README.md"}
