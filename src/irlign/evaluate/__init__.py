"""Stored samples become numbers; nothing here sees a policy."""
