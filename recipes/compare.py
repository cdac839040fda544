"""The old name of `python -m method_comparison.compare`, for two minor versions."""

from recipes.renamed import run_renamed

if __name__ == "__main__":
    run_renamed("compare")
