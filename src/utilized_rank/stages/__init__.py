"""What the stages of a study compute, their notebooks, where their work is done, and what they will take.

Uses the library, `base`, `datasets`, `training` and `study`.
"""
