import pytest

from safemerge_callback.evaluation.units import amount, check_unit, interval, unit_of, within_share


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.719, "share", "71.9 %"),
        (1.0, "share", "100.0 %"),
        (36.5, "share", "36.5"),
        (-0.3, "share", "-0.3"),
        (36.5, "", "36.5"),
        (0.719, "", "0.719"),
        (36.5, "BLEU", "36.5 BLEU"),
        (-0.3, "reward", "-0.3 reward"),
        (123456, "", "123456"),
        (1.5e12, "tokens", "1.5e+12 tokens"),
        (3e-7, "", "3e-07"),
        (float("nan"), "", "nan"),
    ],
)
def test_percent_is_for_shares_alone(value, unit, words):
    assert amount(value, unit) == words


def test_intervals_have_the_same_scale():
    assert interval(0.6, 0.81, "share") == "60 to 81"
    assert interval(34.1, 38.9, "share") == "34.1 to 38.9"
    assert interval(-0.5, -0.1, "") == "-0.5 to -0.1"
    assert within_share(0.5, None, float("nan"))
    assert not within_share(0.5, 1.1)


@pytest.mark.parametrize(
    ("measure", "kind", "declared", "unit"),
    [
        ("advbench_refused", "harm", None, "share"),
        ("xstest_refused", "over_refusal", None, "share"),
        ("coherence", "coherence", None, "share"),
        ("task", "task", None, ""),
        ("eval_loss", "task", None, "nats a token"),
        ("task", "task", "share", "share"),
        ("task", "task", "", ""),
    ],
)
def test_a_journal_that_names_no_unit_has_shares_of_prompts_and_plain_scores(measure, kind, declared, unit):
    assert unit_of(measure, kind, declared) == unit


@pytest.mark.parametrize("unit", [3, None, "a\nb", "x" * 41, "\x1b[31m"])
def test_a_unit_is_a_short_line(unit):
    with pytest.raises(ValueError, match="cannot be shown"):
        check_unit(unit)
    assert check_unit("points of 100") == "points of 100"
