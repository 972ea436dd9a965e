"""What makes a study: all its parameters, where it lies, how it is opened, and where its results came from.

Uses `base`, `datasets` and `training`; and of `networks` the names of precisions.
"""
