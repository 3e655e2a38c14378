"""Adapter methods, one paper per file: the tensors of a layer and their initial values."""
