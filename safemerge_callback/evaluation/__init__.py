"""Floor 5: who judges what a model says, on which prompts, and how sure one can be."""

from ..signals.responses import generate
from ..signals.thoughts import answer_of
from .coherence import coherent
from .intervals import Row, share, wilson
from .judges import Judge, KeywordJudge, check_benign, decides, load_judge, measure_name, refusal_phrases, says
from .verdicts import Verdict, judged, refusals

__all__ = [
    "Judge",
    "KeywordJudge",
    "Row",
    "Verdict",
    "answer_of",
    "check_benign",
    "coherent",
    "decides",
    "generate",
    "judged",
    "load_judge",
    "measure_name",
    "refusal_phrases",
    "refusals",
    "says",
    "share",
    "wilson",
]
