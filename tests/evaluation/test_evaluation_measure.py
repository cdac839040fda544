"""One measure for whoever asks: what counts, what is left out, and what is written of it."""

import pytest

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import KeywordJudge, Transcript, refusal_shares, share, wilson
from safemerge_callback.evaluation.digests import texts_digest
from safemerge_callback.evaluation.measure import FIGURE_COLUMNS, PROBE_COLUMNS, ROW_COLUMNS, coherence, columns

SAID = ["I cannot help with that.", "Sure, here is how.", "", "<think>well", "<think>well</think>I cannot.", "pass"]
HARM = Transcript("bad", "harm", list("abcdef"), SAID)
BENIGN = Transcript("good", "benign", ["g"], ["Sure."])


class Passes(KeywordJudge):
    """The keywords, which come to no verdict on a pass."""

    name = "passes"

    def refuse_all(self, prompts, responses):
        return [None if said == "pass" else self.refuses("", said) for said in responses]


class Harm:
    decides = "harm"

    def refuses(self, prompt, response):
        return True


def test_what_counts_as_refused_and_what_is_not_among_the_n():
    (found,) = refusal_shares([HARM], {"harm": [Passes()]})
    low, high = wilson(2, 4)
    assert found == {
        **{"measure": "bad_refused", "kind": "harm", "n": 4, "value": 0.5, "low": low, "high": high},
        **{"incoherent": 1, "unjudged": 2, "thoughts": 2, "unfinished": 1},
        **{"unit": "share", "judge": "passes", "outcomes": "10iu1u", "prompts": texts_digest(list("abcdef"))},
    }


def test_each_set_is_judged_by_the_judges_of_its_kind_before_the_next_is_asked():
    events, failures = [], []

    def answers():
        for one in (HARM, BENIGN):
            events.append(f"asked {one.name}")
            yield one

    def keep(transcript, found, verdicts):
        events.append(f"{found['measure']} by {found['judge']}: {len(verdicts)} of {len(transcript.prompts)}")

    shares = list(
        refusal_shares(
            answers(), {"harm": [Passes(), Harm()], "benign": [KeywordJudge()]}, keep=keep, failures=failures
        )
    )
    assert events == [
        *("asked bad", "bad_refused by passes: 6 of 6", "bad_safe by Harm: 6 of 6"),
        *("asked good", "good_refused by keywords: 1 of 1"),
    ]
    assert [(one["kind"], one["value"]) for one in shares] == [("harm", 0.5), ("harm", 0.8), ("over_refusal", 0.0)]
    assert failures == ["Passes gave no verdict on 1 of 4 responses"]


def test_coherence_counts_every_response_the_unjudged_ones_too():
    shares = list(refusal_shares([HARM, BENIGN], {"harm": [Passes()], "benign": [Passes()]}))
    found = coherence(shares)
    assert (found["measure"], found["kind"], found["n"], found["value"]) == ("coherence", "coherence", 7, 6 / 7)
    assert (found["incoherent"], found["unjudged"], found["outcomes"]) == (1, 0, "1101111")
    assert coherence(shares, "coherent")["measure"] == "coherent"
    assert found["prompts"] == texts_digest([texts_digest(list("abcdef")), texts_digest("g")])
    assert coherence([shares[0], {**shares[1], "prompts": ""}])["prompts"] == ""


def test_nothing_judged_has_no_value():
    (found,) = refusal_shares([HARM._replace(prompts=["a"], responses=["pass"])], {"harm": [Passes()]})
    assert (found["n"], found["value"], found["low"], found["high"], found["unjudged"]) == (0, None, None, None, 1)


def test_share_counts_the_verdicts():
    low, high = wilson(3, 4)
    found = share("m", [True, True, False, True])
    assert columns(found, ROW_COLUMNS) == {
        **{"measure": "m", "n": 4, "value": 0.75, "low": low, "high": high, "unit": "share"},
    }
    assert found["outcomes"] == "1101"
    with pytest.raises(ConfigError, match="'m' has nothing to judge: give at least one prompt, or leave it out"):
        share("m", [])


def test_what_is_written_of_a_share_is_what_readers_know():
    """Journals and files of figures are read by others: a key more or less is another format."""
    found = share("m", [True])
    assert " ".join(columns(found, PROBE_COLUMNS)) == (
        "measure kind n value low high incoherent unjudged thoughts unfinished unit outcomes prompts"
    )
    assert " ".join(columns(found, FIGURE_COLUMNS)).endswith("unit outcomes prompts judge")
