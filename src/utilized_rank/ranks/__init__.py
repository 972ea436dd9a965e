"""The measure: what counts as a layer, second moments, principal subspaces, projection, and the search for ranks.

Uses `networks`.
"""
