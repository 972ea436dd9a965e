"""Networks of other kinds than the studies' own, measured and made smaller by ``import utilized_rank``."""
