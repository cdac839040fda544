"""Entity F1 by sets, against counts by hand and float64 formulas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.data.ncbi_disease import ncbi_disease_examples
from recipes.entities import entity_counts, entity_set, entity_shares, lists_all
from safemerge_callback.errors import ConfigError
from tests.support.entities import write_corpus

WANTED = "Ataxia-telangiectasia; A-T; T-cell leukaemia"


def f1(wanted, response):
    return entity_counts(wanted, response).f1


@pytest.fixture(scope="module")
def gold(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    return [row["completion"][0]["content"] for row in ncbi_disease_examples("test", str(corpus))]


def values(wanted, responses):
    return [one["value"] for one in entity_shares("x", wanted, responses)]


def test_right_answers_are_1_and_empty_ones_0(gold):
    assert "none" in gold
    assert values(gold, gold) == [1.0, 1.0]
    assert values(gold, [""] * len(gold)) == [0.0, 0.0]
    assert values(gold, ["none"] * len(gold)) == [0.0, gold.count("none") / len(gold)]
    refusal = "I'm sorry, but I can't help with that."
    assert values(gold, [refusal] * len(gold)) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (WANTED, 1),
        ("a-t; T-CELL LEUKAEMIA; ataxia - telangiectasia; A-T.", 1),
        ("- Ataxia-telangiectasia\n- A-T\n2. T-cell leukaemia,", 1),
        ("<think>cancer; none</think>" + WANTED, 1),
        ("A-T", 2 / 4),
        ("A-T; A-T; leukaemia", 2 / 5),
        ("The text names ataxia-telangiectasia, A-T and T-cell leukaemia.", 0),
        ("It names Ataxia-telangiectasia; A-T; and T-cell leukaemia.", 2 / 6),
        ("none", 0),
        ("", 0),
        (" ;\n", 0),
        ("<think>no end", 0),
    ],
)
def test_case_order_repetitions_and_form_do_not_count_and_prose_does(response, score):
    assert f1(WANTED, response) == pytest.approx(score, abs=1e-12)
    assert lists_all(WANTED, response) == (score == 1)


@pytest.mark.parametrize(
    ("response", "score"), [("None.", 1), ("none", 1), ("", 0), ("cancer", 0), ("none; cancer", 0)]
)
def test_where_there_is_nothing_to_name_saying_so_is_right(response, score):
    assert f1("none", response) == score


def test_micro_f1_is_of_all_entities_and_the_other_of_rows():
    wanted, said = ["a; b; c; d", "e", "none"], ["a", "e", "f"]
    micro, mean = entity_shares("task", wanted, said)
    assert (micro["measure"], mean["measure"]) == ("task_f1", "task_row_f1")
    assert micro["value"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 3))
    assert mean["value"] == pytest.approx((2 / 5 + 1 + 0) / 3)
    for one in (micro, mean):
        assert (one["n"], one["unit"], one["kind"]) == (3, "share", "task")
        assert 0 <= one["low"] <= one["value"] <= one["high"] <= 1
    assert entity_shares("task", wanted, said) == [micro, mean]


def test_rows_without_an_entity_have_no_f1():
    with pytest.raises(ConfigError, match="measure 'task_f1': none of the 2 rows has an entity: give more rows"):
        entity_shares("task", ["none", "none"], ["none", "a"])


@given(st.lists(st.sampled_from("abcdef"), max_size=6), st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6))
def test_f1_is_the_formula_of_the_sets(named, wanted):
    found, right = set(named), set(wanted)
    precision = len(found & right) / len(found) if found else 0.0
    recall = len(found & right) / len(right)
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    assert f1("; ".join(wanted), "; ".join(named)) == pytest.approx(expected, abs=1e-12)
    assert f1("; ".join(named) or "none", "; ".join(wanted)) == pytest.approx(expected, abs=1e-12)
    assert entity_set("; ".join(wanted)) == right
