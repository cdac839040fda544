"""What stood here is in `keywords`, named as in YAML: each public name is still given, with a warning."""

from ...io.renamed import renamed

_NAMES = ("KeywordJudge", "refusal_phrases", "says")

__getattr__ = renamed(__name__, dict.fromkeys(_NAMES, "safemerge_callback.evaluation.judges.keywords"))
