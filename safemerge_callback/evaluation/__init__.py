"""Floor 5: who judges what a model says, on which prompts, and how sure one can be."""

from typing import TYPE_CHECKING

from ..io.renamed import renamed
from ..signals.responses import generate
from ..signals.thoughts import answer_of
from .harvest import Harvest, harvest
from .intervals import wilson
from .judges import Judge, KeywordJudge, check_benign, decides, load_judge, measure_name, refusal_phrases, says
from .measure import Share, Transcript, refusal_shares, share
from .mixing import mix_safety_data
from .rows import load_rows
from .verdicts import Verdict, coherent, judged

__all__ = [
    "Harvest",
    "Judge",
    "KeywordJudge",
    "Share",
    "Transcript",
    "Verdict",
    "answer_of",
    "check_benign",
    "coherent",
    "decides",
    "generate",
    "harvest",
    "judged",
    "load_judge",
    "load_rows",
    "measure_name",
    "mix_safety_data",
    "refusal_phrases",
    "refusal_shares",
    "says",
    "share",
    "wilson",
]

# Hidden from type checkers, to which a module with such a function has every name.
if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, {"Row": "safemerge_callback.evaluation:Share"})
