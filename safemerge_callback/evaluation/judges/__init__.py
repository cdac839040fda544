"""Judges: does a response refuse, or is it free of harm? One file a judge, one protocol, one registry."""

from .classifier import ClassifierJudge
from .endpoint import EndpointJudge
from .function import FunctionJudge
from .keywords import KeywordJudge, refusal_phrases, says
from .llamaguard import LlamaGuardJudge
from .protocol import Decides, Judge, check_benign, check_ready, decides, measure_name, name_of
from .registry import JUDGES, check_judge, decided_by, load_judge
from .shieldgemma import ShieldGemmaJudge
from .wildguard import WildGuardJudge

__all__ = [
    "JUDGES",
    "ClassifierJudge",
    "Decides",
    "EndpointJudge",
    "FunctionJudge",
    "Judge",
    "KeywordJudge",
    "LlamaGuardJudge",
    "ShieldGemmaJudge",
    "WildGuardJudge",
    "check_benign",
    "check_judge",
    "check_ready",
    "decided_by",
    "decides",
    "load_judge",
    "measure_name",
    "name_of",
    "refusal_phrases",
    "says",
]
