"""Floor 3: judges and intervals; neither torch nor transformers."""

from .intervals import wilson
from .judges import Judge, KeywordJudge, refusal_phrases

__all__ = ["Judge", "KeywordJudge", "refusal_phrases", "wilson"]
