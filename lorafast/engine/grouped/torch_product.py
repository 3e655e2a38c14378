"""torch's grouped product, and where it refuses."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorafast.engine.grouped.groups import Groups

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# It reads whole vectors of so many bytes.
_ALIGNMENT = 16


def why_not(a: torch.Tensor, b: torch.Tensor) -> str:
    """Why torch cannot multiply rows a [S,P] by their experts' b [E,P,Q]; "" if it can."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped product"
    if a.dtype not in _DTYPES or a.dtype != b.dtype:
        return f"torch's grouped product takes no {a.dtype} with {b.dtype}"
    for name, operand in (("rows", a), ("factors", b)):
        *_, along, across = operand.stride()
        wide = across if along == 1 else along
        if 1 not in (along, across) or wide * operand.element_size() % _ALIGNMENT:
            shape, strides = tuple(operand.shape), operand.stride()
            return f"torch's grouped product takes no {name} {shape} with strides {strides}"
    return ""


def product(groups: Groups, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return row i of a [S,P] times the matrix of its expert in b [E,P,Q], for all i.  -> [S,Q]"""
    return F.grouped_mm(a, b, offs=groups.ends)
