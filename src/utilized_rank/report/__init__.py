"""Tables, figures and pages.

Uses `study`, and of `stages` their names.
"""
