"""A reward becomes a better policy."""
