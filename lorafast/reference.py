"""The formula in plain, differentiable torch: see lorafast.engine.reference."""

from lorafast.engine.reference import linear, row_norm

__all__ = ["linear", "row_norm"]
