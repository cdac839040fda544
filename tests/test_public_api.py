"""The public names, their signatures and the verbs' options are those of a file, so that none changes unnoticed."""

from tests.support.public_api import FILE, api_lines, lines_of


def test_the_public_names_and_verbs_are_those_of_the_file():
    frozen, lines = FILE.read_text(encoding="utf-8").splitlines(), api_lines()
    gone, new = ([line for line in some if line not in others] for some, others in ((frozen, lines), (lines, frozen)))
    assert gone == [], (
        "what was public is no more as it was: keep it at work (docs/deprecation.md), then renew the file"
    )
    assert new == [], "what is public and not in the file: is it meant to be? Then `python -m tests.support.public_api`"
    assert lines == frozen


class Counter(dict):
    total = 0

    def __init__(self, start, *, step=1):
        super().__init__()

    @classmethod
    def of(cls, text="a"):
        return cls(text)

    def _hidden(self):
        pass


def test_a_class_shows_its_constructor_and_its_own_public_members(monkeypatch):
    monkeypatch.setattr(Counter, "__module__", "safemerge_callback.counter")
    assert list(lines_of("Counter", Counter)) == [
        "Counter(start, *, step=1)",
        "Counter.of(cls, text=a)",
        "Counter.total",
    ]


def test_an_address_is_no_part_of_a_signature():
    def function(x: "int | None" = None, y=object()) -> None:  # noqa: B008
        pass

    assert list(lines_of("function", function)) == ["function(x: int | None = None, y=<object object>) -> None"]
