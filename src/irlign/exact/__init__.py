"""Ground truth by enumeration: small sequence MDPs where every quantity of method.md is exact."""
