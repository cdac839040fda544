"""The callback that asks the model: when, what it measures, and the rules that act on it."""
