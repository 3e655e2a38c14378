"""The formula in plain, differentiable torch: see lorafast.engine.reference."""

from lorafast.engine.reference import linear as linear
from lorafast.engine.reference import row_norm as row_norm
