"""The version of the package: one string, so that who writes it into a file need not import the face.

pyproject.toml takes it from here; CITATION.cff repeats it, which tests/test_release.py holds.
"""

__version__ = "0.1.0"
