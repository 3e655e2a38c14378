"""torch's grouped products, and where they refuse."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorafast.engine.grouped.groups import Groups

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The compute capability from which torch has them on a GPU.
_CAPABILITY = (8, 0)
# They read whole vectors of so many bytes.
_ALIGNMENT = 16


def why_not(a: torch.Tensor, b: torch.Tensor) -> str:
    """Why torch multiplies neither a [S,P] by b [E,P,Q] nor aᵀ by b [S,Q], in words; else ""."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped product"
    if a.dtype not in _DTYPES or a.dtype != b.dtype:
        return f"torch's grouped product takes no {a.dtype} with {b.dtype}"
    if a.is_cuda and torch.cuda.get_device_capability(a.device) < _CAPABILITY:
        return f"torch's grouped product needs compute capability {_CAPABILITY}"
    compiling = torch.compiler.is_compiling()
    if compiling and a.dtype is not torch.bfloat16:
        return f"torch's grouped product is compiled for torch.bfloat16, not {a.dtype}"
    for operand in (a, b):
        (*_, rows, columns), (*_, along, across) = operand.shape, operand.stride()
        # The wider stride, and the dim that it steps over.
        wide, dense = (across, rows) if along == 1 else (along, columns)
        bytes_apart = wide * operand.element_size()
        if 1 not in (along, across) or wide < max(1, dense) or bytes_apart % _ALIGNMENT:
            shape, strides = tuple(operand.shape), operand.stride()
            return f"torch's grouped product takes no {shape} with strides {strides}"
        # Under the compiler a tensor has no address.
        if not (operand.is_cpu or compiling) and operand.data_ptr() % _ALIGNMENT:
            return "torch's grouped product takes no operand that begins between 16 bytes"
    return ""


def product(groups: Groups, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return row i of a [S,P] times the matrix of its expert in b [E,P,Q], for all i.  -> [S,Q]"""
    # torch makes rows that begin at multiples of 16 bytes.
    return F.grouped_mm(a, b, offs=groups.ends).contiguous()


def transposed_product(groups: Groups, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return aᵀb over each expert's rows.  a [S,P], b [S,Q] -> [E,P,Q]"""
    return F.grouped_mm(a.t(), b, offs=groups.ends).contiguous()
