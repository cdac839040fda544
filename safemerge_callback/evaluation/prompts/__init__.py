"""Prompt sets by name, from installed packages or the Hub, each with licence and source; or a file of one's own."""

from .load import USER_FILE, PromptSet, check_prompt_set, load_prompt_sets, load_prompts, prompt_file
from .sets import PACKAGED, PROMPT_SETS, SetCard, Where
from .sources import package_files
from .tables import KNOWN

__all__ = [
    "KNOWN",
    "USER_FILE",
    "PACKAGED",
    "PROMPT_SETS",
    "PromptSet",
    "SetCard",
    "Where",
    "check_prompt_set",
    "load_prompt_sets",
    "load_prompts",
    "package_files",
    "prompt_file",
]
