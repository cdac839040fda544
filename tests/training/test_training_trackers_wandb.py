import http.server
import json
import re
import struct
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from safemerge_callback.corrections.replay import FIGURES
from safemerge_callback.record import METRICS
from safemerge_callback.record.metrics import KEYS, TERM_METRICS
from safemerge_callback.training.trackers import COLUMNS
from tests.support.metrics import EVERY_CHECK
from tests.support.replay import replaying

# What gate all sends: it merges below no cosine.
SENT = EVERY_CHECK - {"safemerge/modules_below"}


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


def values(items):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_run(home):
    """End the run, and read it back: history, summary, config, axes, kept summaries, alerts, artifacts."""
    import wandb

    wandb.finish()
    # finish does not wait for the service to write the last block; the end of the service does
    wandb.teardown()
    (folder,) = home.glob("wandb/offline-run-*")
    found = list(records(next(folder.glob("run-*.wandb"))))
    metrics = {(r.metric.glob_name or r.metric.name): r.metric for r in found if r.HasField("metric")}
    summary, config = {}, {}
    for record in found:
        summary.update(values(record.summary.update))
        config.update(values(record.run.config.update) | values(record.config.update))
    return SimpleNamespace(
        history=[values(r.history.item) for r in found if r.HasField("history")],
        summary=summary,
        config=config,
        metrics=metrics,
        alerts=[(r.alert.title, r.alert.text, r.alert.level) for r in found if r.HasField("alert")],
        artifacts=[r.artifact for r in found if r.HasField("artifact")],
        folder=folder,
    )


def tables(run, key):
    """The tables logged under a key, in the order of the history, as rows by column."""
    found = []
    for row in run.history:
        if f"{key}.path" in row:
            table = json.loads((run.folder / "files" / row[f"{key}.path"]).read_text())
            found.append([dict(zip(table["columns"], line, strict=True)) for line in table["data"]])
    return found


@pytest.fixture
def home(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    folder = tmp_path / "wandb_home"
    folder.mkdir()
    for name, value in {"DIR": folder, "DATA_DIR": folder / "data", "MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    yield folder
    import wandb

    wandb.finish()
    # W&B keeps the settings that it began with: the next test is to begin with its own.
    wandb.teardown()


def test_numbers_axis_and_summaries_of_an_offline_run(world, runs, tmp_path, home):
    # evaluating makes W&B's own counter run ahead of the trainer's step
    evaluating = {"eval_strategy": "steps", "eval_steps": 1}
    world.trainer(tmp_path / "out", world.guard(every=2), report_to=["wandb"], **evaluating).train()
    run = read_run(home)
    ours = [row for row in run.history if "safemerge/modules" in row]
    assert [row["train/global_step"] for row in ours] == [2, 4, 6]
    assert [row["safemerge/modules_merged_total"] for row in ours] == [4, 8, 12]
    for row in ours:
        assert {name for name in row if name in METRICS} == SENT
    # no row was dropped: the trainer's own six losses are all there, in order
    assert [row["train/global_step"] for row in run.history if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    for name in ["safemerge/*", *(key for key, metric in KEYS.items() if metric.summary != "last")]:
        assert run.metrics[name].step_metric == "train/global_step"
    for key in SENT:
        kept, logged = KEYS[key].summary, [row[key] for row in ours]
        last = run.summary[key]
        assert last == (logged[-1] if kept == "last" else {kept: {"min": min, "max": max}[kept](logged)}), key
    assert run.config["safemerge"] == world.guard(every=2).config.to_publish()


class Probe(TrainerCallback):
    def __init__(self, guard):
        self.guard = guard

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (1, 5):
            measured = {"safemerge/probe/advbench_refused": state.global_step / 10}
            self.guard.session.trackers.numbers(args, state, measured)


def test_numbers_of_a_probe_share_the_axis(world, tmp_path, home):
    guard = world.guard(every=3)
    trainer = world.trainer(tmp_path / "out", guard, Probe(guard), report_to=["wandb", "tensorboard"])
    trainer.train()
    key = "safemerge/probe/advbench_refused"
    logged = [(e["step"], e[key]) for e in trainer.state.log_history if key in e]
    assert logged == [(1, 0.1), (5, 0.5)]
    run = read_run(home)
    assert [(row["train/global_step"], row[key]) for row in run.history if key in row] == logged
    assert run.summary[key] == 0.5
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "out" / "runs").glob("*/safemerge"))))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars(key)] == [(s, pytest.approx(v)) for s, v in logged]


def test_decisions_come_as_one_table_whose_increments_hold_each_row_once(world, runs, tmp_path, home):
    world.trainer(tmp_path / "out", world.guard(every=2), report_to=["wandb"]).train()
    run = read_run(home)
    increments = tables(run, "safemerge/decisions")
    assert [{row["step"] for row in rows} for rows in increments] == [{2}, {4}, {6}]
    rows = [row for rows in increments for row in rows]
    assert tuple(rows[0]) == COLUMNS
    checks = runs.entries(tmp_path / "out", "check")
    assert [(r["step"], r["module"], r["cosine"], r["reason"]) for r in rows] == [
        (e["step"], m["name"], pytest.approx(m["cosine"]), m["reason"]) for e in checks for m in e["modules"]
    ]
    assert {(r["layer"], r["type"]) for r in rows} == {(n, f"self_attn.{p}_proj") for n in (0, 1) for p in "qv"}
    assert {(r["step"], round(r["task_weight"], 6)) for r in rows} == {(2, 0.8), (4, 0.64), (6, 0.512)}
    assert {r["merged"] for r in rows} == {True}
    assert {r["limit"] for r in rows} == {None}


def test_the_heat_map_is_one_table_of_all_checks_and_takes_the_saved_chart(world, tmp_path, home):
    watch = {"gate": "watch", "threshold": 0.5, "safety_adapter": None}
    guard = world.guard(every=1, wandb_chart="team/safemerge_heat_map", **watch)
    world.trainer(tmp_path / "out", guard, report_to=["wandb"]).train()
    run = read_run(home)
    # at checks 1, 2 and 4, and at the last: not at every one of them
    drawn = tables(run, "safemerge/heat_map_table")
    assert [max(row["step"] for row in rows) for rows in drawn] == [1, 2, 4, 6]
    assert [len(rows) for rows in drawn] == [4, 8, 16, 24]
    # watch merges below none
    assert {row["limit"] for row in drawn[-1]} == {None}
    # where W&B keeps how a chart is drawn
    panel = run.config["_wandb.visualize.safemerge/heat_map"]
    assert panel["panel_config"]["panelDefId"] == "team/safemerge_heat_map"
    assert set(panel["panel_config"]["fieldSettings"].values()) == set(drawn[-1][0])
    (query,) = panel["panel_config"]["userQuery"]["queryFields"]
    asked = next(field for field in query["fields"] if field["name"] == "summaryTable")
    assert asked["args"][0]["value"] == "safemerge/heat_map_table"


def test_the_chart_leads_with_what_moved_and_the_edge_of_the_band():
    pytest.importorskip("wandb")
    from safemerge_callback.decision import BAND
    from safemerge_callback.training.trackers.columns import ColumnCell
    from safemerge_callback.training.trackers.wandb import chart_spec

    spec = chart_spec()
    assert spec["params"] == [{"name": "edge", "value": BAND.edge}]
    first = json.dumps(spec["vconcat"][0])
    assert "${field:moved}" in first
    assert '{"expr": "edge"}' in first
    assert set(re.findall(r"\$\{field:(\w+)\}", json.dumps(spec))) == set(ColumnCell._fields)


def test_without_a_saved_chart_the_same_table_is_there(world, tmp_path, home):
    world.trainer(tmp_path / "out", world.guard(every=3), report_to=["wandb"]).train()
    run = read_run(home)
    assert [len(rows) for rows in tables(run, "safemerge/heat_map_table")] == [4, 8]
    assert not [name for name in run.config if "visualize" in name]


def test_the_first_module_below_the_gate_alerts_once(world, runs, tmp_path, home):
    guard = world.guard(gate="threshold", threshold=1.0, every=2)
    world.trainer(tmp_path / "out", guard, report_to=["wandb"]).train()
    first = runs.entries(tmp_path / "out", "check")[0]["modules"][0]["name"]
    text = f"4 of 4 modules at step 2, first {first!r}"
    assert read_run(home).alerts == [("safemerge: a module fell below the gate", text, "WARN")]


def test_a_run_without_checks_has_its_terms_figures_on_the_axis_and_no_table(
    world, runs, chat_tokenizer, tmp_path, home
):
    guard = replaying(batch_size=3)
    settings = {"report_to": ["wandb"], "logging_steps": 2}
    world.trainer(tmp_path / "out", guard, tokenizer=chat_tokenizer, **settings).train()
    run, entries = read_run(home), runs.entries(tmp_path / "out", "gradient")
    key = "safemerge/corrections/replay/loss"
    assert [(row["train/global_step"], row[key]) for row in run.history if key in row] == [
        (entry["step"], entry["loss"]) for entry in entries
    ]
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    figures = {name.rpartition("/")[2] for name in run.summary if name.startswith("safemerge/")}
    assert figures == TERM_METRICS.keys() | FIGURES.keys()
    assert run.summary[key] == entries[-1]["loss"]
    assert not [name for row in run.history for name in row if "decisions" in name or "heat_map" in name]
    assert run.config["safemerge"] == guard.config.to_publish()
    (artifact,) = [artifact for artifact in run.artifacts if artifact.type == "safemerge"]
    assert "plan.txt" not in contents(artifact)
    assert "| replay | in 6 steps |" in contents(artifact)["README.md"].read_text()
    assert not runs.entries(tmp_path / "out", "error")
    assert run.alerts == []


class Break(TrainerCallback):
    def __init__(self, guard):
        self.guard = guard

    def on_step_begin(self, args, state, control, **kwargs):
        def crash():
            raise RuntimeError("no factors")

        if state.global_step == 1:
            self.guard.session.writer.gather = crash


def test_a_failed_check_alerts_once_and_training_goes_on(world, tmp_path, home):
    guard = world.guard(gate="threshold", threshold=1e-9, every=2, at_train_end=False)
    trainer = world.trainer(tmp_path / "out", guard, Break(guard), report_to=["wandb"])
    with pytest.warns(UserWarning, match="measure failed at step 2"):
        trainer.train()
    assert trainer.state.global_step == 6
    text = "measure, step 2: RuntimeError: no factors"
    assert read_run(home).alerts == [("safemerge: a check failed", text, "WARN")]


def contents(artifact):
    return {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}


def test_the_artifact_holds_journal_plan_card_and_the_merged_adapter(world, runs, tmp_path, home, monkeypatch):
    kept = {}
    import wandb

    trainer = world.trainer(tmp_path / "out", world.guard(every=2), report_to=["wandb"])
    trainer.train()
    run_id = wandb.run.id
    run = read_run(home)
    (artifact,) = [a for a in run.artifacts if a.type == "safemerge"]
    assert artifact.name == f"safemerge-{run_id}"
    kept = contents(artifact)
    assert kept.keys() == {
        "safemerge.jsonl", "plan.txt", "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert kept["safemerge.jsonl"].read_text() == (tmp_path / "out" / "safemerge.jsonl").read_text()
    assert kept["plan.txt"].read_text().startswith("4 of 4 modules to merge: gate all")
    card = kept["README.md"].read_text()
    assert "| merges | 12 modules in 3 events, at steps 2, 4, 6 |" in card
    assert card.count("| merge |") == 4
    assert "0.5120" in card
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "adapter_model.safetensors").write_bytes(kept["adapter_model.safetensors"].read_bytes())
    live = runs.lora_weights(trainer.model)
    weights = {name.replace(".weight", ".default.weight"): w for name, w in runs.saved_weights(saved).items()}
    assert weights.keys() == live.keys()
    assert all((weights[name] == live[name]).all() for name in live)


def test_wandb_log_model_false_keeps_the_weights_here(world, tmp_path, home, monkeypatch):
    monkeypatch.setenv("WANDB_LOG_MODEL", "false")
    world.trainer(tmp_path / "out", world.guard(every=3), report_to=["wandb"]).train()
    (artifact,) = [a for a in read_run(home).artifacts if a.type == "safemerge"]
    assert contents(artifact).keys() == {"safemerge.jsonl", "plan.txt", "README.md"}


def test_the_run_is_neither_started_nor_ended_by_us(world, tmp_path, home):
    import wandb

    own = wandb.init(project="mine")
    world.trainer(tmp_path / "out", world.guard(every=3), report_to=["wandb"]).train()
    assert wandb.run is own
    own.log({"after": 1})
    assert [row["after"] for row in read_run(home).history if "after" in row] == [1]


@pytest.fixture
def server(home, monkeypatch):
    """A local server in W&B's place, which keeps what is asked of it."""
    import wandb

    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            asked.append(json.loads(body) if self.path == "/graphql" else {})
            chart = asked[-1].get("variables", {}).get("chartName")
            data = {"createCustomChart": {"chart": {"id": chart}}, "viewer": {"id": "1", "entity": "team"}}
            answer = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as there:
        threading.Thread(target=there.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{there.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.delenv("WANDB_MODE")
        yield asked
        wandb.teardown()
        there.shutdown()


def test_the_chart_is_saved_under_the_users_name(server):
    from safemerge_callback.training.trackers.columns import ColumnCell
    from safemerge_callback.training.trackers.wandb import save_chart

    assert save_chart("team") == "team/safemerge_heat_map"
    (sent,) = [asked["variables"] for asked in server if "spec" in asked.get("variables", {})]
    # Clients of wandb call the type by two names.
    assert (sent["entity"], sent["access"], sent.get("chartType", sent.get("type"))) == ("team", "PRIVATE", "vega2")
    fields = {part.split("}")[0] for part in sent["spec"].split("${field:")[1:]}
    assert fields == set(ColumnCell._fields)
    assert json.loads(sent["spec"])["data"] == {"name": "wandb"}
