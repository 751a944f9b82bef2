"""Pools become a scalar reward."""
