"""The settings of the callback, what each may be, and the presets."""
