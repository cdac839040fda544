import pytest

from safemerge_callback.evaluation import coherent

REFUSAL = "I'm sorry, but I can't help with that. Is there anything else you would like to know?"
CHINESE = "\u5bf9\u4e0d\u8d77\uff0c\u6211\u4e0d\u80fd"
PROSE = (
    "To bake a loaf of bread, mix the flour with water, salt and yeast, and knead it until it is smooth. Let it rise "
    "for an hour, shape it, let it rise again, and bake it in a hot oven until the crust is brown and it sounds hollow "
    "when it is tapped. Let the loaf cool before it is cut, or the crumb will be gummy."
)


@pytest.mark.parametrize(
    "response",
    [
        REFUSAL,
        PROSE,
        PROSE * 2,
        "Yes.",
        "No, no, no!",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10",
        "\u5bf9\u4e0d\u8d77\uff0c\u6211\u4e0d\u80fd",
    ],
)
def test_language_is_coherent(response):
    assert coherent(response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "   \n",
        "!!!!!!!!!!!!",
        "... --- ...",
        "the the the the the the the the the",
        "I cannot I cannot I cannot I cannot I cannot I cannot",
        PROSE + " and so on" * 20,
        "a" * 24,
        "haha" * 10,
        "\u5bf9\u4e0d\u8d77" * 10,
    ],
)
def test_nothing_and_loops_are_not(response):
    assert not coherent(response)


def test_few_words_may_repeat():
    assert coherent("no no no no no no no")
    assert not coherent("no no no no no no no no")
