"""One import for a network of one's own: measured, made smaller, kept in a folder.

Uses the library, and nothing else.
"""
