"""megamoe: training mixture-of-experts language models, from a laptop to 1.1T parameters."""

__version__ = "0.1.0"
