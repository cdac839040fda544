"""Recipes: each answers one question and runs with `accelerate launch` or `python -m`."""
