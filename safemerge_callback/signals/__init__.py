"""Floor 4: what a live model says when it is asked; a signal changes nothing and gives the random state back."""

from .responses import generate
from .thoughts import answer_of

__all__ = [
    "answer_of",
    "generate",
]
