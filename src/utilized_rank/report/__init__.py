"""Tables, figures and pages.

Uses `base`, `training`, `study`, and of `stages` their names.
"""
