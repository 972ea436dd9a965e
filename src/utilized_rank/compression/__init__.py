"""Smaller networks: low-rank forms, budgets, weights fitted front to back, and ranks for a whole network.

Uses `networks` and `ranks`; the library ends here.
"""
