"""nemolet: typed neural modules of speech and language."""

__version__ = "0.1.0"
