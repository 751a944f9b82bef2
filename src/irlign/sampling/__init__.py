"""Prompts become pools of samples."""
