"""The version, apart from the package so that building a wheel needs no torch."""

__version__ = "0.1.0"
