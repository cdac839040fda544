"""The version of the package: one string, so that who writes it into a file need not import the face."""

__version__ = "0.1.0"
