"""What the command line does with a network that a user names: measured, made smaller, compared, checked.

Uses the library, `api`, `base`, `datasets`, `training` and `report`.
"""
