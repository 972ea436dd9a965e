"""What makes a study: its parameters, where it lies, its files, random numbers, and where results came from.

Uses `networks`, for the names of precisions.
"""
