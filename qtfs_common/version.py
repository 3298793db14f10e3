"""The project's version: the packages' metadata and every ``--version`` take it from here."""

__version__ = "0.1.0"
