"""One run under guard: how it opens, what it does after a step, how it ends."""
