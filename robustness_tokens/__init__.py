"""Adversarially robust vision transformers from a frozen backbone and a handful of learned input tokens."""

__version__ = "0.1.0"
