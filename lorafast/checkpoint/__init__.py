"""Adapter files: what they hold, how they are checked, written and read."""
