"""The formula in plain, differentiable torch: see lorafast.engine.reference."""

from lorafast.engine.reference import grouped_linear, linear, row_norm

__all__ = ["grouped_linear", "linear", "row_norm"]
