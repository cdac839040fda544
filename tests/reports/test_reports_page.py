"""The page without a browser: how large, how quick, what it holds, and that it is one file that loads nothing."""

import base64
import hashlib
import json
import math
import re
import time

import pytest

from recipes.example_run import write_example
from safemerge_callback.decision import BAND, Gate
from safemerge_callback.errors import ConfigError
from safemerge_callback.record.history import TermReading
from safemerge_callback.reports import (
    PAGE_FILE,
    Cell,
    History,
    read_history,
    render_page,
    summary,
    write_page,
    write_report,
)
from safemerge_callback.reports.page.figures import page_figures
from safemerge_callback.reports.payload import page_data
from safemerge_callback.reports.words import NOTHING


def embedded(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def told(data, module, check):
    """The reason of a check, put together as the page does it."""
    words = module["words"] if isinstance(module["words"], int) else module["words"][check]
    numbers = iter(module["numbers"].get(str(check), "").split(" "))
    cosine = f"{module['cosine'][check] / 10_000:.4f}"
    return re.sub(r"\{c\}|\{\}", lambda mark: cosine if mark[0] == "{c}" else next(numbers), data["templates"][words])


@pytest.mark.parametrize("gate", [Gate("threshold", threshold=0.35), Gate("calibrated", z_threshold=3.0), Gate("all")])
def test_224_modules_by_200_checks_are_under_2_mb_and_5_seconds(tmp_path, gate):
    """Gate all merges every module at every check, gate calibrated has the longest reasons."""
    journal = write_example(tmp_path / "run", layers=32, checks=200, gate=gate)
    began = time.process_time()
    history = read_history(journal)
    page = write_page(history, tmp_path / PAGE_FILE)
    assert time.process_time() - began < 5
    assert (len(history.modules), len(history.steps)) == (224, 200)
    assert page.stat().st_size < 2_000_000
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".html"] == [PAGE_FILE]


@pytest.mark.parametrize(
    "gate", [Gate("threshold", threshold=0.35), Gate("reference"), Gate("opposed"), Gate("quantile", quantile=0.2)]
)
def test_the_data_is_the_journal_to_four_digits(tmp_path, gate):
    history = read_history(write_example(tmp_path / "run", layers=3, checks=9, gate=gate))
    data = page_data(history)
    assert sorted(module["name"] for module in data["modules"]) == sorted(history.modules)
    assert data["steps"] == history.steps
    for module in data["modules"]:
        name, left = module["name"], history.task_weights.get(module["name"], {})
        for check, step in enumerate(history.steps):
            cell = history.cells[name, step]
            assert module["cosine"][check] == pytest.approx(10_000 * cell.cosine, abs=0.51)
            assert told(data, module, check) == cell.reason
            assert module["null"] == round(10_000 * cell.null_cosine)
        assert [data["steps"][check] for check in module["merged"]] == list(left)
        assert module["left"] == [round(10_000 * share) for share in left.values()]


def test_the_policy_names_what_is_there_and_allows_nothing_else(example):
    page = render_page(read_history(example))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)[1].replace("&#39;", "'")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(inside) == 1
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert set(rules) == {
        "default-src",
        "script-src",
        "style-src",
        "base-uri",
        "form-action",
        "require-trusted-types-for",
    }
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page.split("<body>")[1].split("<script")[0])
    assert not re.search(r"\son\w+=|style=|innerHTML|\beval\(|document\.write|https?://(?!www\.w3\.org)", page)


def test_names_are_escaped_in_the_markup_and_in_the_data():
    evil = "layers.0.</script><script>alert(1)</script><!--"
    history = History(evil, {(evil, 0): Cell(0.5, 0.4, "measured", reason=evil)}, gate="all", faults=[evil])
    page = render_page(history)
    assert page.count("<script") == 2
    assert "<!--" not in page
    assert "alert(1)" in page
    data = embedded(page)
    assert data["title"] == data["modules"][0]["name"] == evil


def test_it_tells_the_run_its_cost_and_its_sources(example):
    page = render_page(read_history(example))
    words = re.sub(r"<[^>]+>", " ", page.split("<body>")[1].split('<script type="application/json"')[0])
    for fact in ("made-up-aligned", "a" * 64, "made-up.subspace.safetensors", "safemerge-callback", "training_seconds"):
        assert (fact in words) == (fact != "training_seconds"), fact
    assert "ended at step 120" in words
    assert re.search(r"[\d.]+% of 288\.0 s of training", words)
    assert "advbench refused at the last probe" in words
    assert re.search(r"mean signed z at the last check\s+[+-][\d.]+\s+\d+ of \d+ modules point against", words)
    assert "n = 64" in words
    assert "harmless" not in words


def words_of(page):
    return re.sub(r"<[^>]+>|\s+", " ", page.split("<body>")[1].split('<script type="application/json"')[0])


def test_no_score_is_in_percent_that_is_not_a_share(scales):
    words = re.sub(r" +", " ", words_of(render_page(read_history(scales))))
    assert not re.search(r"\d{3,}(\.\d+)? %|-\d+(\.\d+)? %", words.replace("100.0 %", ""))
    for text in ("36.5 BLEU, n = 200", "-0.3, n = 200", "1.23456e+08 tokens", "6e-07, n = 200", "not known"):
        assert text in words, text
    assert re.search(r"translation at the last probe [\d.]+ BLEU, n = 200", words)
    assert re.search(r"pubmedqa accuracy at the last probe [\d.]+ % \d+ to \d+ %, n = 100", words)


def test_tiles_lead_with_what_moved_and_say_what_it_went_with(example, tmp_path):
    entries = [json.loads(line) for line in example.read_text().splitlines()]
    # where a safety adapter was merged in, it lies along V itself
    words = words_of(render_page(read_history(example)))
    assert "says little after merges of a safety adapter" in words
    watched = [entry for entry in entries if entry["kind"] != "merge"]
    path = tmp_path / "safemerge.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in watched))
    history = read_history(path)
    step, mean = max(history.moved.items())
    assert mean == pytest.approx(sum(history.cells[n, step].moved for n in history.modules) / len(history.modules))
    from safemerge_callback.reports.page.figures import tiles

    first = tiles(history)[0]
    assert first.value == f"{mean:+.2f}"
    assert first.note == BAND.words(mean)
    assert "refused less than half" in first.note


def test_a_journal_that_does_not_say_how_far_it_moved_renders_as_before(example, tmp_path):
    entries = [json.loads(line) for line in example.read_text().splitlines()]
    for entry in entries:
        for module in entry.get("modules", ()) if entry["kind"] == "check" else ():
            del module["signed_z"]
        for measure in entry.get("measures", ()):
            del measure["unit"]
    path = tmp_path / "safemerge.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    history = read_history(path)
    assert history.moved == {}
    assert history.moved_words == ""
    page = render_page(history)
    assert 'id="moved"' not in page
    assert "lowest cosine" in page
    assert {m.measure: m.unit for m in history.probes[0].measures} == {
        "advbench_refused": "share",
        "benign_refused": "share",
        "pubmedqa_accuracy": "",
        "eval_loss": "nats a token",
    }


def test_a_module_that_a_compressed_v_left_open_leaves_the_mean_unknown(example, tmp_path):
    entries = [json.loads(line) for line in example.read_text().splitlines()]
    last = [entry for entry in entries if entry["kind"] == "check"][-1]
    del last["modules"][0]["signed_z"]
    path = tmp_path / "safemerge.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    history = read_history(path)
    assert set(history.steps) - set(history.moved) == {last["step"]}


def test_a_run_without_checks_tells_what_was_replayed(replayed, runs):
    page = render_page(read_history(replayed))
    words, entries = re.sub(r" +", " ", words_of(page)), runs.entries(replayed, "gradient")
    (end,) = runs.entries(replayed, "end")
    for part in ('id="moved"', 'id="drift"', 'id="curves"', 'id="weights"', 'id="modules"', 'id="probe"'):
        assert part not in page
    assert "no check, replay in 12 steps; ended at step 12" in words
    assert f"loss of replay at step 12 {entries[-1]['loss']:.3g} at first {entries[0]['loss']:.3g}" in words
    assert re.search(r"steps with replay 12 24 rows, weight 2, interval 1 ", words)
    spent = sum(entry["seconds"] for entry in entries)
    assert f"{spent / end['training_seconds']:.1%} of the training" in words
    assert "corrections.replay.loss kl" in words
    for word in ("threshold", "gate", " merge", "Subspace", "projected"):
        assert word not in words, word
    (term,) = embedded(page)["terms"]
    assert (term["name"], term["steps"], term["counts"], term["rows"]) == (
        "replay",
        [*range(1, 13)],
        [1] * 12,
        [2] * 12,
    )
    for key, name in (("loss", "loss"), ("loss_harm", "harm"), ("loss_benign", "benign")):
        numbers = [entry["figures"].get(key, entry.get(key)) for entry in entries]
        assert term["losses"][name] == [None if x is None else pytest.approx(x, rel=1e-3) for x in numbers]
    assert term["norm"] == [pytest.approx(entry["norm"], rel=1e-3) for entry in entries]


def test_changes_alone_have_no_cosines(changed):
    history = read_history(changed)
    page = render_page(history)
    assert re.findall(r'<section id="([a-z]+)"', page) == ["weights", "modules", "happened", "run"]
    assert re.findall(r'data-key="([a-z-]+)"', page) == ["name", "change-shrink", "left"]
    assert "cosine" not in re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL).lower()
    assert "2 modules changed at steps 2 to 8; ended at step 8" in page
    heads = re.findall(r"\w+(?: \w+)?", summary(history).splitlines()[2])
    assert heads == ["type", "modules", "merges", "shrink", "task left"]
    assert "check" not in summary(history)


def test_checks_and_a_gradient_term_stand_beside_each_other(both, example):
    page, without = render_page(read_history(both)), render_page(read_history(example))
    for part in ('id="moved"', 'id="drift"', 'id="probe"', 'id="modules"'):
        assert part in page
    assert 'id="losses"' in page
    assert 'id="losses"' not in without
    assert "terms" not in embedded(without)
    words = re.sub(r" +", " ", words_of(page))
    assert "28 modules, 12 checks at steps 10 to 120, replay in 120 steps; ended at step 120" in words
    assert "steps with replay 120 240 rows, weight 0.5, interval 1" in words
    assert "passes of replay 6.0 s 2.1% of the training" in words
    assert re.search(r"passes of replay +6\.0 s for 120 steps", words)


def test_a_long_term_has_a_table_that_ends_with_its_last_reading():
    readings = {step: TermReading(1.0, 0.5 / step, 1) for step in range(1, 1002)}
    (table,) = page_figures(History("run", terms={"rows": readings}))["terms"]
    assert table["every"] == 6
    assert [row[0] for row in table["rows"]] == [str(step) for step in range(1001 - 6 * 166, 1002, 6)]
    assert table["heads"] == ["until step", "steps", "rows", "loss", "norm", "cosine", "seconds"]
    (short,) = page_figures(History("run", terms={"rows": {1: TermReading(1.0, math.nan, 1)}}))["terms"]
    assert (short["every"], short["rows"]) == (1, [["1", "1", *[NOTHING] * 5]])


def test_a_terms_name_and_figures_are_set_as_text():
    evil = "</script><img src=x>"
    reading = TermReading(1.0, 0.5, 1, figures={f"loss_{evil}": 1.0, evil: 2.0})
    page = render_page(History("run", terms={evil: {1: reading}}))
    assert page.count("<script") == 2
    assert "<img" not in page
    assert embedded(page)["terms"][0]["losses"] == {"loss": [0.5], evil: [1.0]}


def test_what_a_run_lacks_is_left_out():
    cells = {("layers.0.a", step): Cell(0.5, 0.4, "measured") for step in (0, 5)}
    page = render_page(History("run", cells, gate="watch"))
    for part in ('id="weights"', 'id="probe"', 'id="happened"'):
        assert part not in page
    assert "no start entry" in page
    assert "signed z" not in page
    assert "has not ended" in page


def test_where_it_is_written(tmp_path, example):
    history = read_history(example)
    assert write_report(history, example) == example.with_name(PAGE_FILE)
    assert write_report(history, example.parent) == example.parent / PAGE_FILE
    assert write_report(history, tmp_path / "a" / "b.html").read_text() == (example.parent / PAGE_FILE).read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(history, tmp_path / "file" / "b.html")
    with pytest.raises(ConfigError, match=r"end in one of \.html, \.png"):
        write_report(history, tmp_path / "b.htmx")
    with pytest.raises(ConfigError, match="a page holds them all"):
        write_report(history, tmp_path / "b.html", "probe")
    with pytest.raises(ConfigError, match=r"must end in \.html"):
        write_page(history, tmp_path / "b.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file"]
