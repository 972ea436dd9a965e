"""What the stages of a study compute, their notebooks, and what they will take.

Uses the library, `base`, `datasets`, `training` and `study`.
"""
