"""Images: as arrays or files, where they come from, and how they are split.

Uses `base`; and of `networks` what a device is.
"""
