"""Nested Runtime: an online continual-learning inference server for HOPE models."""

__version__ = "0.1.0"
