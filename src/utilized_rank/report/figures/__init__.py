"""Figures: results in (tables), figures out; one style for the whole study."""
