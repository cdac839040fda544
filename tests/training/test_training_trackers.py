import contextlib
import json
import os
import sqlite3
import struct
import warnings
from pathlib import Path

import pytest

from safemerge_callback.training import METRICS
from safemerge_callback.training.trackers import COLUMNS


def records(path):
    """The protobuf records of a .wandb file: a 7-byte header, then a LevelDB log in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, pending = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        pending += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(pending)
            pending = b""
            yield record


def key(item):
    return item.key or ".".join(item.nested_key)


@pytest.fixture
def wandb_run(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb_home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "wandb_home").mkdir()
    yield tmp_path / "wandb_home"
    import wandb

    wandb.finish()


def test_wandb_offline_run_read_back(world, runs, tmp_path, wandb_run):
    import wandb

    # evaluating makes W&B's own counter run ahead of the trainer's step
    evaluating = {"eval_strategy": "steps", "eval_steps": 1}
    world.trainer(tmp_path / "out", world.guard(every=2), report_to=["wandb"], **evaluating).train()
    wandb.finish()
    # finish does not wait for the service to write the last block; the end of the service does
    wandb.teardown()
    (folder,) = wandb_run.glob("wandb/offline-run-*")
    found = list(records(next(folder.glob("run-*.wandb"))))
    history = [{key(i): json.loads(i.value_json) for i in r.history.item} for r in found if r.HasField("history")]
    ours = [row for row in history if "safemerge/modules" in row]
    assert [row["train/global_step"] for row in ours] == [2, 4, 6]
    assert [row["safemerge/modules_merged_total"] for row in ours] == [4, 8, 12]
    for row in ours:
        assert {name for name in row if name in METRICS} == METRICS.keys()
    # no row was dropped: the trainer's own six losses are all there, in order
    assert [row["train/global_step"] for row in history if "train/loss" in row] == [1, 2, 3, 4, 5, 6]

    axes = {(r.metric.glob_name or r.metric.name): r.metric.step_metric for r in found if r.HasField("metric")}
    assert axes["safemerge/*"] == "train/global_step"
    configs = [u for r in found if r.HasField("run") for u in r.run.config.update]
    configs += [u for r in found if r.HasField("config") for u in r.config.update]
    settings = [json.loads(u.value_json) for u in configs if key(u) == "safemerge"]
    assert settings == [world.guard(every=2).config.to_dict()]

    tables = [json.loads(p.read_text()) for p in sorted(folder.glob("files/media/table/safemerge/*.table.json"))]
    assert {tuple(t["columns"]) for t in tables} == {COLUMNS}
    rows = [dict(zip(COLUMNS, row, strict=True)) for table in tables for row in table["data"]]
    assert sorted((r["step"], r["module"]) for r in rows) == sorted(
        (e["step"], m["name"]) for e in runs.entries(tmp_path / "out", "check") for m in e["modules"]
    )
    assert {r["merged"] for r in rows} == {True}


def test_wandb_without_a_live_run_gets_nothing(world, tmp_path, wandb_run):
    import wandb

    from safemerge_callback.training.trackers import Report, to_wandb

    assert wandb.run is None
    kept = {}
    to_wandb(Report(1, {"safemerge/modules": 4.0}, [], {}, str(tmp_path)), kept)
    assert kept == {}
    assert list(wandb_run.rglob("*.wandb")) == []


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_event_file_read_back(world, runs, tmp_path):
    world.trainer(tmp_path, world.guard(every=3), report_to=["tensorboard"]).train()
    (run,) = (tmp_path / "runs").iterdir()
    assert [step for step, _ in scalars(run)["train/loss"]] == [1, 2, 3, 4, 5, 6]
    ours = scalars(run / "safemerge")
    assert ours.keys() == METRICS.keys()
    lowest = [(e["step"], min(m["cosine"] for m in e["modules"])) for e in runs.entries(tmp_path, "check")]
    assert ours["safemerge/cosine_min"] == [(step, pytest.approx(value)) for step, value in lowest]


def test_a_failing_tracker_is_warned_of_once_and_gets_no_more(world, runs, tmp_path, monkeypatch):
    folder = tmp_path / "tb"
    folder.mkdir()
    (folder / "safemerge").write_text("a file where the folder should be")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
    trainer = world.trainer(tmp_path / "out", world.guard(every=2), report_to=["tensorboard"])
    with pytest.warns(UserWarning, match="tracker 'tensorboard' failed at step 2") as caught:
        trainer.train()
    assert len([w for w in caught if "safemerge" in str(w.message)]) == 1
    assert [e["step"] for e in runs.entries(tmp_path / "out", "merge")] == [2, 4, 6]
    assert len([e for e in trainer.state.log_history if "safemerge/modules" in e]) == 3


def test_trackio_run_read_back(world, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trackio")
        world.trainer(tmp_path / "out", world.guard(every=3), report_to=["trackio"], project="watched").train()
    with contextlib.closing(sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "watched.db")) as database:
        rows = [json.loads(blob) for (blob,) in database.execute("select metrics from metrics order by id")]
    ours = [row for row in rows if "safemerge/modules" in row]
    assert [(row["train/global_step"], row["safemerge/modules_merged_total"]) for row in ours] == [(3, 4.0), (6, 8.0)]
    assert len([row for row in rows if "train/loss" in row]) == 6


def test_mlflow_run_read_back(world, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mlflow.start_run() as run:
            world.trainer(tmp_path / "out", world.guard(every=3), report_to=["mlflow"]).train()
        history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "safemerge/modules_merged_total")
    assert [(m.step, m.value) for m in history] == [(3, 4.0), (6, 8.0)]


def test_nothing_is_tracked_where_the_trainer_does_not_report(world, tmp_path):
    world.trainer(tmp_path, world.guard()).train()
    assert {p.name for p in Path(tmp_path).iterdir()} == {"pre_merge", "safemerge.jsonl"}
