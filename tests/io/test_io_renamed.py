"""A name that moved is still found where it was, with a word."""

import importlib

import pytest

MOVED = [
    ("safemerge_callback.adapters", "safemerge_callback.live", "base_weights"),
    ("safemerge_callback.adapters", "safemerge_callback.live", "writer_for"),
    ("safemerge_callback.decision", "safemerge_callback.record", "Journal"),
    ("safemerge_callback.evaluation.generation", "safemerge_callback.signals.responses", "tokenized"),
    ("safemerge_callback.decision", "safemerge_callback.record", "check_entry"),
    ("safemerge_callback.decision", "safemerge_callback.methods", "check_merge"),
    ("safemerge_callback.evaluation.judges.keyword", "safemerge_callback.evaluation.judges.keywords", "KeywordJudge"),
    ("safemerge_callback.decision", "safemerge_callback.decision.weights.soft", "attenuated"),
]


@pytest.mark.parametrize(("before", "now", "name"), MOVED)
def test_a_name_that_moved_is_found_where_it_was_with_a_warning(before, now, name):
    with pytest.warns(DeprecationWarning, match=f"{name} moved from {before} to {now}: import it from there"):
        found = getattr(importlib.import_module(before), name)
    assert found is getattr(importlib.import_module(now), name)


@pytest.mark.parametrize("module", ["safemerge_callback.adapters", "safemerge_callback.decision"])
def test_a_name_that_never_was_is_none(module):
    with pytest.raises(AttributeError, match="has no attribute 'base_wights'"):
        _ = importlib.import_module(module).base_wights


def test_a_name_that_is_another_one_now_is_told_by_that():
    evaluation = importlib.import_module("safemerge_callback.evaluation")
    with pytest.warns(DeprecationWarning, match="Row is now Share of safemerge_callback.evaluation: import that"):
        assert evaluation.Row is evaluation.Share
