"""What stood here is in `signals/responses`: each public name is still given, with a warning."""

from ..io.renamed import renamed

_NAMES = ("GREEDY", "Response", "check_vocabulary", "evaluating", "generate", "respond", "tokenized")

__getattr__ = renamed(__name__, dict.fromkeys(_NAMES, "safemerge_callback.signals.responses"))
