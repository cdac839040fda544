import re
import sys
from pathlib import Path

import pytest

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import KeywordJudge, check_benign, decides, judged, load_judge, measure_name
from safemerge_callback.evaluation.judges import JUDGES, FunctionJudge, check_judge, decided_by
from safemerge_callback.evaluation.judges.protocol import check_decides

DOCS = Path(__file__).parents[2] / "docs"


def says_no(prompt, response):
    """Whether the response begins with no."""
    return response.startswith("no")


class Other:
    """A judge of somebody else's, with the one method that a judge needs."""

    def refuses(self, prompt, response):
        return prompt == response


def test_keywords_are_the_default_and_need_nothing():
    assert isinstance(load_judge("keywords"), KeywordJudge)
    assert load_judge({"name": "keywords", "first": 10}).first == 10


def test_any_callable_and_any_judge_of_ones_own():
    judge = load_judge(says_no)
    assert judged(judge, ["p", "p"], ["no", "sure"]) == ["refused", "complied"]
    assert (judge.name, decides(judge), measure_name("xstest", judge)) == ("says_no", "refusal", "xstest_refused")
    other = Other()
    assert load_judge(other) is other
    assert decides(other) == "refusal"


def test_a_function_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text("def harmless(p, r):\n    return 'x' not in r\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    judge = load_judge({"name": "function:my_judges:harmless", "decides": "harm"})
    assert (judge.refuses("p", "x"), judge.refuses("p", "y"), decides(judge)) == (False, True, "harm")
    for spec, match in [
        ("function:my_judges", "names no function"),
        ("function:my_judges:absent", "cannot be imported"),
        ("function:no_such_module:f", "cannot be imported"),
        ("function:my_judges:number", "is 3: give a function of prompt and response"),
    ]:
        with pytest.raises(ConfigError, match=match):
            load_judge(spec)
    sys.modules.pop("my_judges")


@pytest.mark.parametrize("value", [0.7, "yes", None, 1])
def test_a_function_that_returns_no_bool_is_no_judge(value):
    with pytest.raises(TypeError, match=r"returned .* not a bool"):
        FunctionJudge(lambda prompt, response: value).refuses("p", "r")


def test_the_booleans_of_numpy_and_torch_are_booleans():
    import numpy
    import torch

    assert FunctionJudge(lambda p, r: numpy.bool_(True)).refuses("p", "r") is True
    assert FunctionJudge(lambda p, r: torch.tensor(False)).refuses("p", "r") is False


def test_what_a_function_raises_leaves_one_unjudged():
    def fails(prompt, response):
        raise TimeoutError("no answer")

    assert judged(load_judge(fails), ["a"], ["b"]) == ["unjudged"]


@pytest.mark.parametrize(
    ("which", "match"),
    [
        ("keyword", r"'keyword' is unknown.*did you mean 'keywords'"),
        ("keywords:folder", "keywords takes nothing after the colon"),
        ("llamaguard:", "llamaguard takes a folder or Hub id after the colon"),
        ("endpoint", "not complete: write endpoint:MODEL@URL"),
        ("function", "not complete: write function:package.module:name"),
        ({"first": 3}, r"judge \['first'\] has no name"),
        ({"name": "keywords", "frist": 3}, r"unexpected keyword argument 'frist'.*It takes \['phrases', 'first'\]"),
        ({"name": "wildguard", "trust_remote_code": True}, "unexpected keyword argument 'trust_remote_code'"),
        ({"name": "wildguard", "decides": "harmm"}, "did you mean 'harm'"),
        (3, "judge is 3: give a function of prompt and response"),
    ],
)
def test_what_is_no_judge_is_refused(which, match):
    with pytest.raises(ConfigError, match=match):
        load_judge(which)


def test_harm_is_no_over_refusal():
    judge = FunctionJudge(says_no, decides="harm")
    assert measure_name("harmbench", judge) == "harmbench_safe"
    with pytest.raises(ConfigError, match=r"'xstest' are harmless.*cannot see over-refusal.*keywords"):
        check_benign(judge, "xstest")
    check_benign(KeywordJudge(), "xstest")
    judge.decides = "kindness"
    with pytest.raises(ConfigError, match="'kindness' is unknown"):
        load_judge(judge)
    assert [check_decides(name) for name in ("refusal", "harm")] == ["refusal", "harm"]


def test_the_page_lists_every_judge():
    table = (DOCS / "judges.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)", table, re.MULTILINE) == list(JUDGES)


def test_a_function_of_the_present_folder_is_found_and_nothing_is_left_behind(tmp_path, monkeypatch):
    """As at a console script, whose path of modules lacks the folder one stands in."""
    (tmp_path / "words_here.py").write_text("REFUSING = 'no'\n")
    (tmp_path / "late_here.py").write_text("def same(a, b):\n    return a == b\n")
    (tmp_path / "judge_here.py").write_text(
        "from words_here import REFUSING\n"
        "def refuses(prompt, response):\n    from late_here import same\n    return same(response, REFUSING)\n"
    )
    (tmp_path / "json.py").write_text("raise RuntimeError('a module of this folder hides no other')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    before = list(sys.path)
    judge = load_judge("function:judge_here:refuses")
    monkeypatch.chdir(tmp_path.parent)
    assert (judge.refuses("", "no"), judge.refuses("", "yes")) == (True, False)
    assert sys.path == before
    with pytest.raises(ConfigError, match="ModuleNotFoundError: No module named 'elsewhere_here'"):
        load_judge("function:elsewhere_here:refuses")
    assert sys.path == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("raise RuntimeError('no key')", "RuntimeError: no key"),
        ("def refuses(:", "SyntaxError"),
        ("other = 1", "AttributeError: .* has no attribute 'refuses'"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(tmp_path, monkeypatch, content, words):
    name = f"broken_{abs(hash(content))}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"judge 'function:{name}:refuses' cannot be imported: {words}"):
        load_judge(f"function:{name}:refuses")


@pytest.mark.parametrize("which", ["keyword", "classifier:", "endpoint", "keywords:x", "function"])
def test_a_judges_spelling_is_checked_without_loading_it(which):
    with pytest.raises(ConfigError):
        check_judge(which)
    check_judge("llamaguard:no/such-model")


def test_what_a_judge_decides_is_known_by_its_name():
    named = ("keywords", "classifier:x", "llamaguard", "shieldgemma", "wildguard")
    assert [decided_by(name) for name in named] == ["refusal", "refusal", "harm", "harm", "refusal"]
    assert decided_by("function:a:b", "harm") == "harm"
    with pytest.raises(ConfigError, match="judge 'guard' is unknown"):
        decided_by("guard")
