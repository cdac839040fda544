"""Two evaluations beside each other: what may be compared, how, and what it comes to."""

import json

import pytest

from safemerge_callback.evaluation.comparison import compare, comparison_document
from safemerge_callback.evaluation.figures_file import Evaluation
from safemerge_callback.evaluation.measure import as_share, share_of


def harm(letters, **known):
    return share_of("bad_refused", letters, "harm", **{"judge": "keywords", "prompts": "p", **known})


def over(letters, **known):
    return share_of("good_refused", letters, "over_refusal", **{"judge": "keywords", "prompts": "q", **known})


def compared(first, second, **second_known):
    return compare(Evaluation("a", first), Evaluation("b", second, **second_known))


FEW, MANY = "1" * 20 + "0" * 20, "1" * 34 + "0" * 6


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        ([harm(FEW)], [harm(MANY)], "better"),
        ([harm(MANY)], [harm(FEW)], "worse"),
        ([over(MANY)], [over(FEW)], "better"),
        ([harm(FEW), over(FEW)], [harm(MANY), over(MANY)], "mixed"),
        ([harm(FEW)], [harm("1" + FEW[1:])], "unclear"),
        (
            [as_share("eval_loss", "task", 2.0, 9, 1.9, 2.1)],
            [as_share("eval_loss", "task", 1.0, 9, 0.9, 1.1)],
            "better",
        ),
        ([as_share("bleu", "task", 30, 9, 29, 31)], [as_share("bleu", "task", 20, 9, 19, 21)], "worse"),
        ([as_share("bleu", "task", 30)], [as_share("bleu", "task", 20)], "unclear"),
        ([], [harm(FEW)], "not_measured"),
    ],
)
def test_the_outcome_is_what_whole_intervals_say(first, second, outcome):
    found = compared(first, second)
    assert (found.outcome, found.exit_code) == (outcome, 4 if outcome == "not_measured" else 0)


def test_pairs_see_what_shares_do_not():
    first, second = harm("1" * 30 + "0" * 10), harm("1" * 36 + "0" * 4)
    by_prompt = compared([first], [second])
    by_share = compared([first], [{**second, "outcomes": ""}])
    assert (by_prompt.outcome, by_share.outcome) == ("better", "unclear")
    one, other = by_prompt.contrasts[0], by_share.contrasts[0]
    assert (one.paired, other.paired) == (True, False)
    assert (one.change.value, other.change.value) == pytest.approx((0.15, 0.15))
    assert by_prompt.notes == ()
    assert by_share.notes == ("bad_refused: no outcome a prompt is there of both, so shares are compared",)


def test_other_prompts_of_one_source_are_compared_by_share_and_of_another_not_at_all():
    first = Evaluation("a", [harm(FEW)], {"bad": "HarmBench; read from one 1.0"})
    other = [harm(MANY, prompts="else")]
    same_source = compare(first, Evaluation("b", other, {"bad": "HarmBench; read from one 2.0"}))
    assert [one.paired for one in same_source.contrasts] == [False, False]
    assert same_source.notes == ("bad_refused: the prompts differ, so shares are compared and not answers",)
    elsewhere = compare(first, Evaluation("b", other, {"bad": "AdvBench"}))
    assert elsewhere.outcome == "not_measured"
    assert elsewhere.left_out == (("bad_refused", "other prompts: of 'HarmBench' and of 'AdvBench'"),)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ([harm(MANY, judge="llamaguard")], "judged by keywords and by llamaguard"),
        ([harm("uu")], "nothing was judged of the second"),
        ([over(FEW)], "the second has none"),
        ([{**harm(MANY), "unit": ""}], "measured in share and in plain numbers"),
    ],
)
def test_what_cannot_be_compared_is_named(second, reason):
    found = compared([harm(FEW)], second)
    assert ("bad_refused", reason) in found.left_out
    assert found.outcome == "not_measured"


def test_each_judge_is_compared_with_itself_and_one_that_is_not_known_with_any():
    two = [harm(FEW), harm(MANY, judge="llamaguard")]
    found = compared(two, two[::-1])
    assert [(one.judge, one.change.value) for one in found.contrasts[:2]] == [("keywords", 0.0), ("llamaguard", 0.0)]
    assert compared([harm(FEW, judge=None)], [harm(MANY)]).contrasts[0].judge == "keywords"


def test_coherence_is_of_the_sets_of_both_once_a_set():
    first = [harm("11ii", judge="a"), harm("1111", judge="b"), over("0000"), share_of("coherence", "1", "coherence")]
    second = [harm("1111", judge="a"), harm("1111", judge="b"), over("000i"), share_of("more_refused", "ii", "harm")]
    found = compared(first, second).contrasts[-1]
    assert (found.kind, found.first, found.second, found.change.n, found.paired) == ("coherence", 6 / 8, 7 / 8, 8, True)
    without = [{**one, "outcomes": ""} for one in first]
    found = compared(without, second).contrasts[-1]
    assert (found.first, found.second, found.paired) == (6 / 8, 7 / 8, False)


def test_how_they_were_asked_is_told_where_it_differs():
    first = Evaluation("a", [harm(FEW)], manner={"template": "x", "max_new_tokens": 24, "system": "be good"})
    second = Evaluation("b", [harm(MANY)], manner={"template": "y", "max_new_tokens": 64})
    assert compare(first, second).notes == ("max_new_tokens is 24 and 64", "the two have other chat templates")


def test_the_document_is_plain_json():
    found = compared([harm(FEW), as_share("bleu", "task", 30)], [harm(MANY), as_share("bleu", "task", 20), over(FEW)])
    document = json.loads(json.dumps(comparison_document(found, "a", "b")))
    assert set(document) == {"outcome", "exit_code", "first", "second", "contrasts", "left_out", "notes"}
    assert set(document["contrasts"][0]) == {
        *("measure", "kind", "unit", "judge", "first", "second", "change", "paired", "effect"),
    }
    assert document["contrasts"][0]["change"].keys() == {"value", "low", "high", "n"}
    assert document["contrasts"][1]["change"] is None
    assert document["left_out"] == [{"measure": "good_refused", "reason": "the first has none"}]
