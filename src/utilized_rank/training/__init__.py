"""Architectures by name, their initial weights with and without labels, and the one training loop.

Uses `networks`, `base` and `datasets`.
"""
