"""What the command line does with a network that a user names: measured, made smaller, compared, checked.

Uses `networks`, `ranks`, `api`, `base`, `datasets`, `training`, `study` and `report`.
"""
