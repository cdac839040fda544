"""Floor 3: judges and intervals; neither torch nor transformers."""

from .intervals import Row, share, wilson
from .judges import Judge, KeywordJudge, refusal_phrases, says

__all__ = ["Judge", "KeywordJudge", "Row", "refusal_phrases", "says", "share", "wilson"]
