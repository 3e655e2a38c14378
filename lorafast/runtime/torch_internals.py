"""Whether anybody has to see an op of ours go by: whoever traces, counts, wraps, transforms or records what torch is asked for.

Where nobody does, and every tensor is a plain one, torch's dispatcher would only carry a call from us to us.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_dispatch_modes, _function_modes = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
)
_transforms, _tracing, _profiler = (
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
    torch._C._autograd._profiler_enabled,
)


def present() -> bool:
    """Whether a mode, a transform, a tracer or a profiler looks on here and now. A compiler shows in that no tensor is plain."""
    return (
        _dispatch_modes() > 0
        or _function_modes() > 0
        or _transforms()
        or forward_ad._current_level >= 0
        or _tracing() is not None
        or _profiler()
    )


def plain(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether all are tensors (others: or None) whose numbers lie as they are in the memory of one CPU or GPU.

    No subclass, nothing on meta, and nothing the dispatcher would have to unwrap, negate or fill in first. Under a compiler: no.
    """
    return signature(x, *others) is not None


def signature(x: torch.Tensor, *others: torch.Tensor | None) -> tuple | None:
    """Of tensors that are plain: x's dtype and width, the others' dtypes and shapes. None if one of them is not."""
    kind = type(x)
    if torch.compiler.is_compiling() or (kind is not _Tensor and kind is not _Parameter):
        return None
    if x.is_neg() or x._is_zerotensor() or _wrapped(x):
        return None
    on_cpu, device = x.is_cpu, x.device
    if not (on_cpu or x.is_cuda):
        return None
    seen = [x.dtype, x.shape[-1:]]
    for t in others:
        if t is None:
            seen.append(None)
            continue
        kind = type(t)
        if (
            (kind is not _Parameter and kind is not _Tensor)
            or (not t.is_cpu if on_cpu else t.device != device)
            or t.is_neg()
            or t._is_zerotensor()
            or _wrapped(t)
        ):
            return None
        seen.append(t.dtype)
        seen.append(t.shape)
    return tuple(seen)
