"""Trajectories, weights and probe as pictures."""

import math

import pytest

from safemerge_callback.errors import ConfigError
from safemerge_callback.reports import PLOTS, Cell, History, draw_plot, read_history, write_report


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_is_a_picture(both, tmp_path, plot):
    from matplotlib.image import imread

    picture = imread(write_report(read_history(both), tmp_path / "x.png", plot))
    assert min(picture.shape[:2]) > 500
    assert 0.01 < (picture[..., :3] < 0.9).any(axis=-1).mean() < 0.95
    for ending in (".svg", ".pdf"):
        assert write_report(read_history(both), tmp_path / f"x{ending}", plot).stat().st_size > 2000


def test_trajectories_are_the_lowest_modules_with_null_and_threshold(example):
    history = read_history(example)
    axes = draw_plot(history, "trajectories").axes[0]
    last = history.steps[-1]
    lowest = sorted(history.modules, key=lambda name: history.cells[name, last].cosine)[:5]
    lines = {line.get_label(): line for line in axes.lines}
    assert [label for label in lines if label.startswith("layers")] == lowest
    for name in lowest:
        assert list(lines[name].get_ydata()) == [history.cells[name, step].cosine for step in history.steps]
    nulls = {history.cells[name, last].null_cosine for name in lowest}
    assert nulls <= {line.get_ydata()[0] for line in axes.lines if len(line.get_ydata())}
    assert list(lines["threshold 0.35"].get_ydata()) == [0.35, 0.35]


def test_weights_are_what_each_merge_left(example):
    history = read_history(example)
    axes = draw_plot(history, "weights").axes[0]
    for line in axes.lines[1:]:
        left = history.task_weights[line.get_label()]
        assert line.get_ydata()[-1] == pytest.approx(left[max(left)])
        assert line.get_ydata()[0] == left.get(history.steps[0], 1.0)


def test_the_probe_shows_harm_over_refusal_and_task_with_intervals(example):
    history = read_history(example)
    axes = draw_plot(history, "probe").axes[0]
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert words == ["advbench refused (harm)", "benign refused (over refusal)", "pubmedqa accuracy (task)"]
    segments = axes.containers[0].lines[2][0].get_segments()
    first = next(m for m in history.probes[0].measures if m.kind == "harm")
    assert segments[0][:, 1] == pytest.approx([first.low, first.high])


def test_every_measure_that_is_no_share_has_an_axis_in_its_unit(scales):
    axes = draw_plot(read_history(scales), "probe").axes
    assert [one.get_ylabel() for one in axes] == [
        "share of the prompts",
        "BLEU",
        "score",
        "score",
        "score",
        "tokens",
        "score",
    ]
    assert axes[0].get_ylim() == (0, 1)
    for one in axes:
        low, high = one.get_ylim()
        points = [value for line in one.lines for value in line.get_ydata()]
        assert points
        assert all(low <= value <= high for value in points)


def test_losses_are_those_of_the_journal_by_kind_with_merges_norm_and_cosine(both):
    history = read_history(both)
    losses, norm, cosine = draw_plot(history, "losses").axes
    readings = history.terms["replay"]
    lines = {line.get_label(): line for line in losses.lines}
    assert list(lines["loss"].get_xdata()) == list(readings)
    assert list(lines["loss"].get_ydata()) == [reading.loss for reading in readings.values()]
    assert list(lines["harm"].get_ydata()) == [reading.figures["loss_harm"] for reading in readings.values()]
    known = {step: r.figures["loss_benign"] for step, r in readings.items() if "loss_benign" in r.figures}
    assert dict(zip(lines["benign"].get_xdata(), lines["benign"].get_ydata(), strict=True)) == known
    assert len(known) < len(readings)
    assert list(lines["modules merged"].get_xdata()) == [min(step for _, step in history.merges)] * 2
    assert [axes.get_ylabel() for axes in (losses, norm, cosine)] == [
        "replay: loss",
        "norm of the gradient",
        "cosine to the task's",
    ]
    for axes, key in ((norm, "norm"), (cosine, "cosine")):
        numbers = {step: getattr(reading, key) for step, reading in readings.items()}
        known = [(step, number) for step, number in numbers.items() if not math.isnan(number)]
        assert list(zip(*axes.lines[0].get_data(), strict=True)) == known


def test_a_run_without_checks_is_drawn_by_what_it_has(replayed, tmp_path):
    history = read_history(replayed)
    figure = draw_plot(history, "losses")
    assert len(figure.axes) == 3
    assert figure.axes[0].get_title(loc="left") == "out: replay"
    assert write_report(history, tmp_path / "x.svg").read_text().count("replay: loss") == 1
    for plot in ("heatmap", "moved", "trajectories"):
        with pytest.raises(ConfigError, match="nothing was checked in this run; choose losses"):
            draw_plot(history, plot)
    with pytest.raises(ConfigError, match="nothing was merged"):
        draw_plot(history, "weights")


def test_moved_is_the_mean_beside_the_edge(example):
    history = read_history(example)
    axes = draw_plot(history, "moved").axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["mean of all modules"] == list(history.moved.values())
    assert lines["edge -0.55"] == [-0.55, -0.55]
    bare = History("run", {("layers.0.a", 0): Cell(0.4, 0.4, "measured")}, gate="watch")
    with pytest.raises(ConfigError, match="does not say how far the updates go along V"):
        draw_plot(bare, "moved")


def test_what_cannot_be_plotted_is_refused():
    bare = History("run", {("layers.0.a", 0): Cell(math.nan, 0.4, "broken")}, gate="watch")
    for plot, match in (("weights", "nothing was merged"), ("probe", "no probe"), ("heatmaps", "did you mean|heatmap")):
        with pytest.raises(ConfigError, match=match):
            draw_plot(bare, plot)
    assert draw_plot(bare, "trajectories").axes
    with pytest.raises(ConfigError, match="no gradient term was in this run; choose heatmap"):
        draw_plot(bare, "losses")
    with pytest.raises(ConfigError, match="nothing was checked"):
        draw_plot(History("run"), "heatmap")
