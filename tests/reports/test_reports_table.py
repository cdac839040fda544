"""The table of `safemerge eval`: percent for shares, any other number as it is."""

from safemerge_callback.evaluation.measure import as_share
from safemerge_callback.reports.table import figures_text


def figure(name, kind, value, low=None, high=None, **more):
    return as_share(name, kind, value, 8, low, high, judge="lm-eval", **more)


def test_every_figure_has_its_own_scale():
    text = figures_text(
        [
            figure("harmbench_refused", "harm", 0.875, 0.5, 0.98),
            figure("wikitext_bits_per_byte", "task", 0.81, 0.7, 0.9),
            figure("wmt_bleu", "task", 36.5, 34.0, 39.0),
            figure("reward", "task", -0.3),
            figure("gsm8k_exact_match", "task", 0.25, 0.1, 0.4, unit="share"),
        ],
        "a model",
    )
    rows = {line.split("│")[2].strip(): " ".join(line.split()) for line in text.splitlines() if line.count("│") > 3}
    assert "│ 87.5% │ 50.0% to 98.0% │" in rows["harmbench_refused"]
    assert "│ 0.81 │ 0.7 to 0.9 │" in rows["wikitext_bits_per_byte"]
    assert "│ 36.5 │ 34 to 39 │" in rows["wmt_bleu"]
    assert "│ -0.3 │" in rows["reward"]
    assert "│ 25.0% │ 10.0% to 40.0% │" in rows["gsm8k_exact_match"]
