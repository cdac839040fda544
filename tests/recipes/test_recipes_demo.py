import io
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from rich.console import Console

from recipes import demo, demo_report
from recipes.evaluate import share
from recipes.processor import ProcessorPace
from safemerge_callback.errors import ConfigError
from safemerge_callback.record import Journal
from safemerge_callback.record.entries import Sources, end_entry, start_entry
from safemerge_callback.record.progress import Progress

ROOT = Path(__file__).parents[2]


def rows(refused, benign, right, n=48):
    """Rows of one arm: refusals of the three sets, harmless refusals and right answers, each out of n."""
    counts = dict(zip(demo_report.COLUMNS, [*refused, benign, right], strict=True))
    return [share(measure, [True] * count + [False] * (n - count)) for measure, count in counts.items()]


def test_the_verdict_names_the_sets_whose_intervals_part():
    said = demo_report.verdict(rows((12, 12, 10), 4, 42), rows((44, 20, 42), 6, 42))
    assert said[0] == (
        "Of 144 harmful prompts held out, plain fine-tuning leaves 34 refused (17-31 %), with the callback 106 "
        "(66-80 %): clearly more."
    )
    assert said[1] == "With the callback the model refuses clearly more on AdvBench and HarmBench."
    assert said[2].startswith("On StrongREJECT the 95 % intervals overlap")
    assert "+0.0 points, within 3 points" in said[3]
    assert "+4.2 points" in said[4]


def test_three_points_exactly_are_within_three_points():
    said = demo_report.verdict(rows((9, 9, 9), 4, 180, n=200), rows((9, 9, 9), 4, 174, n=200))
    assert "-3.0 points, within 3 points" in said[2]
    said = demo_report.verdict(rows((9, 9, 9), 4, 180, n=200), rows((9, 9, 9), 4, 173, n=200))
    assert "-3.5 points, worse by more than 3 points" in said[2]


def test_the_verdict_does_not_claim_what_is_not_there():
    said = demo_report.verdict(rows((12, 12, 12), 4, 44), rows((14, 13, 12), 4, 40))
    assert not any("clearly more" in line for line in said)
    assert "no clear change" in said[0]
    assert said[1].startswith("On AdvBench and StrongREJECT and HarmBench the 95 % intervals overlap")
    assert "-8.3 points, worse by more than 3 points" in said[2]


def test_fewer_refusals_are_never_called_a_gain():
    said = demo_report.verdict(rows((44, 44, 44), 4, 40), rows((2, 2, 2), 4, 46))
    assert "clearly fewer." in said[0]
    assert "clearly fewer on AdvBench and StrongREJECT and HarmBench" in said[1]
    assert "+12.5 points, better by more than 3 points" in said[2]


def test_the_table_shows_shares_intervals_n_and_the_cost():
    cost = {"rows": 0, "merges": 6, "distinct": 58, "modules": 60, "seconds": 1.31, "share": 0.021}
    arms = {
        "plain": {"rows": rows((12, 12, 12), 4, 42)},
        "guarded": {"rows": rows((44, 20, 42), 6, 42), "callback": cost},
    }
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(demo_report.table(arms))
    text = console.export_text()
    for expected in ("25.0", "(15-39)", "n=48", "58 of 60", "6 times", "1.3 s", "2.1%"):
        assert expected in text


def test_what_is_paid_once_is_told_apart_from_what_the_steps_take(tmp_path):
    journal = Journal(tmp_path / "safemerge.jsonl")
    sources = Sources(None, None, None)
    journal.append(start_entry(0, {}, {}, sources, 60, prepared={"replay": 40.0}))
    journal.append(end_entry(60, Progress(), 58.0, 200.0))
    cost = demo.callback_cost(journal.path, 200.0)
    assert (cost["prepared"], cost["share"]) == (40.0, 0.29)
    assert cost["share_of_steps"] == pytest.approx(18 / 160)
    (line,) = demo_report.cost_lines({"plain": {}, "SafeMergeCallback()": {"callback": cost}})
    assert line == (
        "SafeMergeCallback() took 18.0 s, 11.2% of the training; before the first step 40.0 s, for the answers to the "
        "prompts, which a next run has in its cache, and one pass a row (with both 29.0%)."
    )


def test_an_arm_is_freed_before_the_next():
    class Trainer:
        pass

    def arm():
        trainer = Trainer()
        trainer.callbacks = [trainer]
        trainers.append(weakref.ref(trainer))
        return {"train_seconds": 1.0}

    trainers = []
    assert demo.freed(arm()) == {"train_seconds": 1.0}
    assert trainers[0]() is None


def test_only_a_folder_of_its_own_is_replaced(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not a demo's"):
        demo.fresh_folder(theirs)
    assert (theirs / "thesis.tex").exists()
    ours = demo.fresh_folder(tmp_path / "ours")
    (ours / "old").touch()
    assert not (demo.fresh_folder(ours) / "old").exists()


def test_settings_are_those_of_the_machine_and_leave_a_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    demo.set_environment(tmp_path)
    assert (os.environ["WANDB_MODE"], os.environ["WANDB_DIR"]) == ("disabled", str(tmp_path))
    for quicker, dtype in ((2.0, "bfloat16"), (0.6, "float32"), (1.05, "float32")):
        pace = ProcessorPace("some processor", 100.0, 100.0 * quicker)
        words = demo.machine_settings(pace)
        settings = dict(zip(words[::2], words[1::2], strict=True))
        assert set(settings) == {"--bf16", "--use_cpu", "--disable_tqdm"}
        assert settings["--bf16"] == str(dtype == "bfloat16")


def test_the_table_for_the_readme_says_when_and_on_what_and_in_which_dtype():
    cost = {"rows": 0, "merges": 6, "distinct": 58, "modules": 60, "seconds": 1.31, "share": 0.021}
    arms = {"plain": {"rows": rows((12, 12, 12), 4, 42)}, "guarded": {"rows": rows((44, 20, 42), 6, 42)}}
    arms["guarded"]["callback"] = cost
    pace = ProcessorPace("AMD EPYC (AVX512)", 124.0, 82.0)
    about = demo.about_run({"pace": pace._asdict(), "dtype": pace.dtype, "seconds": 600.0})
    lines = demo_report.markdown(arms, about).splitlines()
    assert lines[0].endswith("refused, or answered rightly, in % with 95 % intervals:")
    assert (
        "float32 (bfloat16 at 0.66 times the pace of float32 on AMD EPYC (AVX512), measured), 10.0 minutes" in lines[0]
    )
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert lines[-1].startswith("| guarded | 91.7 (80-97) | 41.7 (29-56) |")
    assert lines[-1].endswith("| 58 of 60 modules, 6 times |")
    assert lines[4].endswith("| 87.5 (75-94) |  |")


@pytest.mark.slow
def test_the_demo_runs_offline_from_installed_packages_and_leaves_its_files(tmp_path):
    """A short run: 12 steps, so that one periodic and one final merge happen."""
    run = tmp_path / "demo"
    short = ["--output", str(run), "--n-prompts", "4", "--n-task", "8", "--max_steps", "12"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-m", "recipes.demo", *short],
        cwd=ROOT,
        env={**environment, "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stdout + done.stderr
    results = json.loads((run / "results.json").read_text())
    assert list(results["arms"]) == ["as shipped", "aligned", "fine-tuned", *demo.GUARDED]
    assert results["equal_before_first_merge"]
    pace = ProcessorPace(**results["pace"])
    assert (results["dtype"], pace.float32 > 0) == (pace.dtype, True)
    assert str(pace) in done.stdout.replace("\n", " ")
    assert (run / "results.md").read_text() in done.stdout + "\n"
    replayed, merged = (results["arms"][name] for name in demo.GUARDED)
    for arm in (replayed, merged):
        assert results["arms"]["fine-tuned"]["losses"] != arm["losses"]
        assert 0 < arm["callback"]["share_of_steps"] <= arm["callback"]["share"] < 1
    assert (merged["callback"]["merges"], merged["callback"]["modules"], merged["callback"]["rows"]) == (2, 60, 0)
    assert (replayed["callback"]["prepared"] > 0, merged["callback"]["prepared"]) == (True, 0)
    assert (replayed["callback"]["merges"], replayed["callback"]["rows"]) == (0, 12)
    for name in (
        "drift.png",
        *(f"{folder}/{name}" for folder in demo.GUARDED.values() for name in (demo.PAGE, "safemerge.jsonl")),
        "subspace.safetensors",
        "plain/adapter_model.safetensors",
    ):
        assert (run / name).stat().st_size > 0, name
    assert len(list((run / "wandb").glob("offline-run-*/*.wandb"))) == 3
