"""Every method on every world and seed, compared against the true reward."""
