"""Recursive Language Models in notebooks: the namespace is the environment."""

__version__ = "0.1.0"
