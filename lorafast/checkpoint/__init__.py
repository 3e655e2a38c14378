"""Adapter files: their format, how they are checked, written and read."""
