import warnings

import pytest

from safemerge_callback import MergePlan, Subspace, apply, load_adapter, measure, read_journal, writer_for
from safemerge_callback.errors import ConfigError
from safemerge_callback.training import LoopLog
from tests.support.metrics import EVERY_CHECK


def checked(world, log, steps=(10, 20), threshold=1.0):
    """A loop's checks, merged by the gate, on a model that has moved."""
    import torch

    model = world.model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    writer, subspace, safety = writer_for(model), Subspace.load(world.subspace), load_adapter(world.safety)
    for step in steps:
        plan = MergePlan.decide(measure(writer.gather(), subspace), threshold=threshold)
        log.check(step, plan, apply(plan, writer, safety, subspace), seconds=0.25)
    return model


def test_a_loop_without_a_trainer_writes_tensorboard_and_the_journal(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with LoopLog(tmp_path, ["tensorboard"], settings={"threshold": 1.0}) as log:
        checked(world, log)
        log.numbers(20, {"safemerge/probe/advbench_refused": 0.5})
    events = EventAccumulator(str(tmp_path / "runs" / "safemerge"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*EVERY_CHECK, "safemerge/probe/advbench_refused"}
    assert [(e.step, e.value) for e in events.Scalars("safemerge/milliseconds")] == [(10, 250.0), (20, 250.0)]
    assert [e.value for e in events.Scalars("safemerge/modules_merged_total")] == [4, 8]
    found = [(e["kind"], e["step"]) for e in read_journal(tmp_path / "safemerge.jsonl")]
    assert found == [("check", 10), ("merge", 10), ("check", 20), ("merge", 20)]


def test_a_loop_hands_its_files_to_mlflow(world, tmp_path, monkeypatch, mlflow_store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow = pytest.importorskip("mlflow")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
        monkeypatch.chdir(tmp_path)
        mlflow.set_experiment(tmp_path.name)
        with mlflow.start_run() as run, LoopLog(tmp_path / "out", "mlflow") as log:
            model = checked(world, log)
            log.finish(model)
        client = mlflow.MlflowClient()
        kept = {f.path.removeprefix("safemerge/") for f in client.list_artifacts(run.info.run_id, "safemerge")}
        last = client.get_run(run.info.run_id).data.metrics
    files = {"safemerge.jsonl", "plan.txt", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert kept == {*files, "heat_map.png"}
    assert last["safemerge/task_weight_min"] == pytest.approx(0.64)


def test_another_rank_writes_nothing(world, tmp_path):
    with LoopLog(tmp_path / "out", ["tensorboard"], enabled=False) as log:
        checked(world, log)
    assert not (tmp_path / "out").exists()
    assert log.progress.merges == 2


def test_a_tracker_that_we_do_not_know_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"tracker 'tensorbord' is unknown.*did you mean 'tensorboard'"):
        LoopLog(tmp_path, ["tensorbord"])


def test_a_journal_that_cannot_be_written_is_told_once(world, tmp_path):
    log = LoopLog(tmp_path)
    log.journal.path.unlink()
    log.journal.path.mkdir()
    with pytest.warns(UserWarning, match="the journal lacks entries from step 10 on") as caught:
        checked(world, log)
    assert [str(w.message) for w in caught if "safemerge" in str(w.message)][1:] == []
