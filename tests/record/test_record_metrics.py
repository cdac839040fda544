import math
import re
from pathlib import Path

import pytest

from safemerge_callback.corrections.registry import CORRECTIONS
from safemerge_callback.decision import Edit, MergePlan, Reading, Readings
from safemerge_callback.record.metrics import KEYS, METRICS, TERM_METRICS, check_metrics, limit_of, term_key, z_of
from safemerge_callback.record.progress import Progress


def readings(cosines, null_std=0.1, **more):
    return Readings(
        Reading(f"layers.{n}.q_proj", c, 0.4, 1.0, 4, (8, 8), null_std=null_std, **{"signed_cosine": c - 0.5, **more})
        for n, c in enumerate(cosines)
    )


def numbers(plan, edits=(), progress=None, seconds=0.5):
    found = check_metrics(plan, edits, progress or Progress(), seconds)
    return {key.removeprefix("safemerge/"): value for key, value in found.items()}


def test_the_numbers_of_a_check_by_hand():
    cosines = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.0]
    measured = readings(cosines)
    said = {"safety_slope": dict.fromkeys(measured, 0.25), "gram_cosine": dict.fromkeys(measured, 0.5)}
    plan = MergePlan.decide(measured.with_signals(said), gate="threshold", threshold=0.35)
    progress = Progress(task_weights={"layers.0.q_proj": 0.5}, modules_merged=3, seconds=2.0)
    found = numbers(plan, [Edit("layers.0.q_proj", 0.2, 0.1), Edit("layers.1.q_proj", 0.3, 0.1)], progress)
    assert found == pytest.approx(
        {
            "cosine_min": 0.0,
            "cosine_p10": 0.1,
            "cosine_p50": 0.5,
            "cosine_mean": 0.5,
            "cosine_max": 1.0,
            "null_cosine_mean": 0.4,
            "z_min": -4.0,
            "z_mean": 1.0,
            # in standard deviations of 1/8: (c - 0.5)·8, of which 0.0, 0.1 and 0.2 lie below -2
            "signed_z_min": -4.0,
            "signed_z_mean": 0.0,
            # norms are 1 here
            "moved_mean": 0.0,
            "modules_opposed": 3,
            "safety_slope_mean": 0.25,
            "gram_cosine_mean": 0.5,
            "modules": 11,
            "modules_below": 4,
            "modules_merged": 2,
            "modules_merged_total": 3,
            "task_weight_min": 0.5,
            "task_weight_mean": 10.5 / 11,
            "residual_max": 0.3,
            "milliseconds": 500,
            "seconds_total": 2.0,
        }
    )
    assert {f"safemerge/{key}" for key in found} == METRICS.keys()


def test_no_z_without_a_spread_and_none_for_what_has_not_moved():
    plan = MergePlan.decide(readings([0.3], null_std=None, signed_cosine=None), gate="threshold")
    signs = {"signed_z_min", "signed_z_mean", "moved_mean", "modules_opposed"}
    assert not ({"z_min", "z_mean"} | signs) & numbers(plan).keys()
    assert z_of(Reading("a", 1.0, 0.4, 0.0, 4, (8, 8), null_std=0.1)) is None
    assert z_of(Reading("a", math.nan, 0.4, math.nan, 4, (8, 8), null_std=0.1)) is None


def test_how_far_is_not_in_which_direction():
    both = [
        Reading(n, 0.5, 0.4, norm, 4, (8, 8), signed_cosine=c) for n, norm, c in [("a", 3.0, -0.5), ("b", 1.0, 0.5)]
    ]
    found = numbers(MergePlan.decide(Readings(both), gate="all"))
    assert (found["signed_z_mean"], found["moved_mean"]) == (0.0, (-4.0 * 3.0 + 4.0) / 2)


def test_the_mean_is_of_all_modules_or_of_none():
    """Those that a compressed V left open are a few chosen ones."""
    exact = Reading("a", 0.5, 0.4, 3.0, 4, (8, 8), signed_cosine=-0.5)
    still, broken = Reading("b", 1.0, 0.4, 0.0, 4, (8, 8)), Reading("c", math.nan, 0.4, math.nan, 4, (8, 8))
    open_one = Reading("d", 0.5, 0.4, 3.0, 4, (8, 8), interval=(0.4, 0.6))
    assert Readings([exact, still, broken]).moved_mean == -12.0
    assert Readings([exact, open_one]).moved_mean is None
    assert Readings([still]).moved_mean is None
    signs = {"signed_z_min", "signed_z_mean", "moved_mean", "modules_opposed"}
    assert not signs & numbers(MergePlan.decide(Readings([exact, open_one]), gate="all")).keys()


@pytest.mark.parametrize(
    ("gate", "limit", "below"),
    [
        ({"gate": "threshold", "threshold": 0.35}, 0.35, 2),
        ({"gate": "watch", "threshold": 0.35}, None, None),
        ({"gate": "calibrated", "z_threshold": -2.0}, 0.2, 1),
        ({"gate": "reference"}, 0.3, 1),
        ({"gate": "num_layers", "num_layers": 1}, None, None),
        ({"gate": "all"}, None, None),
    ],
)
def test_below_the_gate_is_by_the_gates_own_cosine(gate, limit, below):
    plan = MergePlan.decide(readings([0.1, 0.3, 0.5], reference=0.6), **gate)
    found = limit_of(plan, plan.readings["layers.0.q_proj"])
    assert found == (None if limit is None else pytest.approx(limit))
    # absent, not 0, for a gate that has none
    assert numbers(plan).get("modules_below") == below


def test_a_gate_with_a_limit_that_no_module_is_below_counts_none():
    still = [Reading("a", 1.0, 0.4, 0.0, 4, (8, 8))]
    assert numbers(MergePlan.decide(Readings(still), gate="threshold"))["modules_below"] == 0
    assert numbers(MergePlan.decide(readings([0.6]), gate="threshold"))["modules_below"] == 0


def test_an_update_that_is_not_finite_spoils_no_number():
    plan = MergePlan.decide(readings([0.3, math.nan]), gate="threshold")
    found = numbers(plan)
    assert found["cosine_mean"] == pytest.approx(0.3)
    assert found["z_min"] == pytest.approx(-1.0)
    assert all(math.isfinite(value) for value in found.values())


PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def page_table(heading, page=PAGE):
    body = page.split(heading, 1)[1].split("\n\n", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("| `")
    ]
    return {cells[0].strip("`"): cells[1:] for cells in rows}


def test_the_page_has_every_key_with_its_unit_its_summary_and_its_meaning():
    assert page_table("| key | unit | W&B keeps | meaning |") == {
        key: [metric.unit, metric.summary, metric.meaning] for key, metric in KEYS.items()
    }


def test_the_page_has_every_figure_of_a_gradient_term():
    keys = {term_key("<name>", figure): metric for figure, metric in TERM_METRICS.items()}
    for name, kind in CORRECTIONS.items():
        assert not kind.figures.keys() & TERM_METRICS.keys()
        keys |= {term_key(name, figure): metric for figure, metric in kind.figures.items()}
    page = PAGE.split("## Numbers of gradient terms", 1)[1]
    assert page_table("| key | unit | W&B keeps | meaning |", page) == {
        key: [metric.unit, metric.summary, metric.meaning] for key, metric in keys.items()
    }


def test_the_page_names_all_else_that_any_tracker_is_sent():
    sources = Path(__file__).parents[2] / "safemerge_callback" / "training" / "trackers"
    sent = set()
    for path in sources.glob("*.py"):
        sent |= set(re.findall(r'"(safemerge[/.][a-z_.]+)"', path.read_text()))
    listed = page_table("| key | W&B | TensorBoard | MLflow | trackio | what it is |").keys()
    sent = {name.removesuffix(".json") for name in sent} - {"safemerge/step"} - KEYS.keys()
    assert sent <= listed
    assert {key for key in listed if "<" not in key} <= sent | {"safemerge/heat_map_table"} | {"safemerge-<run id>"}


def test_the_page_has_every_column_of_the_decisions_table():
    from safemerge_callback.training.trackers import COLUMNS

    assert tuple(page_table("| column | meaning |")) == COLUMNS
