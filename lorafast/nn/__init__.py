"""Adapter layers as torch modules."""
