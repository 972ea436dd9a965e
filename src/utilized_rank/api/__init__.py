"""One import for a network of one's own: measured, made smaller, kept in a folder.

Uses `networks`, `ranks` and `compression`; the library ends here.
"""
