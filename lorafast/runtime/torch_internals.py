"""Every private symbol of torch that lorafast uses, looked up with a guard.

What rests on them saves time and nothing else: it is on for the torch versions of TESTED_VERSIONS
and off for all others, where torch's public functions give the same numbers. One symbol has no
public counterpart: the guard of dispatch_below_autograd, which torch's own custom ops use too.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

# The base of modes that see every operation; documented, in a module that is not.
DispatchMode = TorchDispatchMode

# The releases on which the whole test suite has passed with the private symbols in use.
TESTED_VERSIONS = frozenset({(2, 13)})


def is_tested(version: str) -> bool:
    """True if the private symbols may be used on this version of torch, such as "2.13.0+cpu"."""
    # A nightly build or a release candidate has the number of a release that does not exist yet.
    release = re.fullmatch(r"(\d+)\.(\d+)\.\d+(\+.*)?", version)
    return release is not None and (int(release[1]), int(release[2])) in TESTED_VERSIONS


def _find(path: str) -> Any:
    """Return the attribute of torch._C at the dotted path, or None if this torch lacks it."""
    found = getattr(torch, "_C", None)
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


_has_storage = _find("_has_storage")
_dispatch_modes = _find("_len_torch_dispatch_stack")
_function_modes = _find("_len_torch_function_stack")
_transforms_active = _find("_are_functorch_transforms_active")
_tracing_state = _find("_get_tracing_state")
_profiler_enabled = _find("_autograd._profiler_enabled")
_requires_grad = _find("_any_requires_grad")
_any_autocast = _find("_is_any_autocast_enabled")
_exclude_keys = _find("_ExcludeDispatchKeyGuard")
_below_autograd = _find("_AutoDispatchBelowAutograd")
_mkldnn_enabled = _find("_get_mkldnn_enabled")

_NEEDED = (
    _has_storage,
    _dispatch_modes,
    _function_modes,
    _transforms_active,
    _tracing_state,
    _profiler_enabled,
    _requires_grad,
    _any_autocast,
    _exclude_keys,
    _below_autograd,
    getattr(torch.Tensor, "_is_zerotensor", None),
    getattr(forward_ad, "_current_level", None),
)

# True if calls may bypass torch's dispatcher. A test sets it to False to pretend another torch.
enabled = is_tested(torch.__version__) and all(symbol is not None for symbol in _NEEDED)

_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter

# Autocast's dispatch keys run before every kernel and would cast the fp32 sums inside one; and,
# for a call that bypasses the dispatcher, what _AutoDispatchBelowAutograd excludes.
_AUTOCAST_KEYS = _AUTOGRAD_KEYS = None
if enabled:
    _keys = torch._C.DispatchKey
    _AUTOCAST_KEYS = torch._C.DispatchKeySet(_keys.AutocastCPU)
    for _device in ("CUDA", "XPU", "MPS", "HPU", "PrivateUse1"):
        _AUTOCAST_KEYS |= torch._C.DispatchKeySet(getattr(_keys, f"Autocast{_device}"))
    _AUTOGRAD_KEYS = _AUTOCAST_KEYS
    for _key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        _AUTOGRAD_KEYS |= torch._C.DispatchKeySet(getattr(_keys, _key))


def bypasses_dispatcher(x: torch.Tensor, tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """True if nothing would notice that an op of lorafast is called as a plain function.

    No observer is active, nothing compiles, and all tensors are plain ones on one CPU or GPU: no
    subclass, no meta tensor, nothing that the dispatcher would unwrap, negate or fill in first.
    Batched and sparse tensors have no storage, by which they are known.
    """
    # One function with everything written out: it runs at every call of a layer.
    if (
        not enabled
        or torch.compiler.is_compiling()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _transforms_active()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or _profiler_enabled()
    ):
        return False
    kind = type(x)
    if kind is not _Tensor and kind is not _Parameter:
        return False
    on_cpu = x.is_cpu
    if not (on_cpu or x.is_cuda):
        return False
    if x.is_neg() or x._is_zerotensor() or not _has_storage(x):
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        kind = type(tensor)
        if (
            (kind is not _Parameter and kind is not _Tensor)
            or (not tensor.is_cpu if on_cpu else tensor.device != x.device)
            or tensor.is_neg()
            or tensor._is_zerotensor()
            or not _has_storage(tensor)
        ):
            return False
    return True


def dispatch_modes_active() -> bool:
    """True if a dispatch mode would see operations on any tensor, or if this torch cannot say."""
    return _dispatch_modes is None or _dispatch_modes() > 0


def needs_plain_ops(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """True if an op of lorafast would be foreign to what comes next: torch's own ops are not.

    torch.export, torch.jit.trace and the ONNX exporters write programs for places without lorafast.
    A sparse or nested tensor, and a subclass that computes its ops itself, know torch's ops alone.
    """
    if torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch.jit.is_tracing() or any(t is not None and is_foreign(t) for t in tensors)


def is_foreign(tensor: torch.Tensor) -> bool:
    """True if the tensor is sparse, nested, or of a subclass that computes its ops itself."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return True
    own = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    # torch's fake and functional tensors serve any op that is registered.
    return own and not type(tensor).__module__.startswith("torch._subclasses")


def transforms_active() -> bool:
    """True inside a torch.func transform or a forward-mode AD level."""
    functorch = _transforms_active is not None and _transforms_active()
    return functorch or getattr(forward_ad, "_current_level", -1) >= 0


def has_tangent(tensors: list[torch.Tensor]) -> bool:
    """True if forward-mode AD follows one of the tensors."""
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def functorch_active() -> bool:
    """True inside a torch.func transform."""
    return _transforms_active is not None and _transforms_active()


def _any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


# True if one of the tensors given (or None) requires a gradient; a function of C where there is.
any_requires_grad: Callable[..., bool] = _requires_grad if enabled else _any_requires_grad


def _autocast_devices() -> list[str]:
    devices = ("cpu", "cuda", "xpu", "mps", "hpu", "privateuseone")
    return [device for device in devices if torch.is_autocast_enabled(device)]


# True if autocast is on for some device.
any_autocast: Callable[[], bool] = _any_autocast if enabled else lambda: bool(_autocast_devices())


def nothing_casts_or_traces() -> bool:
    """True if autocast is off and torch.jit does not trace."""
    tracing = torch.jit.is_tracing() if _tracing_state is None else _tracing_state() is not None
    return not (tracing or any_autocast())


@contextlib.contextmanager
def _without_autocast():
    with contextlib.ExitStack() as stack:
        for device in _autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def below_autocast() -> contextlib.AbstractContextManager:
    """A context in which autocast casts nothing: the dtypes of a call are fixed before its op."""
    return _exclude_keys(_AUTOCAST_KEYS) if enabled else _without_autocast()


def below_autograd() -> contextlib.AbstractContextManager:
    """A context in which autocast casts nothing and autograd records nothing."""
    if enabled:
        return _exclude_keys(_AUTOGRAD_KEYS)
    stack = contextlib.ExitStack()
    stack.enter_context(_without_autocast())
    stack.enter_context(torch.no_grad())
    return stack


def dispatch_below_autograd() -> contextlib.AbstractContextManager:
    """A context in which an op called from its own Autograd kernel reaches the kernel below it.

    torch's own Python code for custom ops relies on the same guard.
    """
    if _below_autograd is None:
        raise RuntimeError(
            f"torch {torch.__version__} has no torch._C._AutoDispatchBelowAutograd, without which "
            "lorafast's ops have no gradients: install a torch of "
            + ", ".join(f"{major}.{minor}" for major, minor in sorted(TESTED_VERSIONS))
        )
    return _below_autograd()


def function_apply(function: type[torch.autograd.Function]) -> Callable:
    """Return Function.apply, without its search for functorch transforms where there are none."""
    owner: Any = super(torch.autograd.Function, function) if enabled else function
    return owner.apply


def version_of(tensor: torch.Tensor) -> int:
    """Return how often the tensor has been written in place, as autograd counts it."""
    return tensor._version


def running_load() -> tuple[bool, int]:
    """Return the strict of the load_state_dict that calls this, and the stacklevel of its caller.

    torch passes a module's _load_from_state_dict True whatever the user said, so the arguments are
    read from the frame of nn.Module.load_state_dict. Without such a frame it counts as strict.
    """
    frame, level = sys._getframe(1), 1
    while frame is not None:
        level += 1
        if frame.f_code is torch.nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals.get("strict", True)), level
        frame = frame.f_back
    return True, 2


def is_traced_or_transformed() -> bool:
    """Return True while torch compiles, traces or transforms a call."""
    return torch.compiler.is_compiling() or transforms_active() or torch.jit.is_tracing()


def takes_saved_tensor_hooks() -> bool:
    """Return True unless hooks on saved tensors are forbidden now, or this torch cannot say."""
    enabled = _find("_autograd._saved_tensors_hooks_is_enabled")
    return enabled is not None and enabled()


def saved_tensor_hooks() -> tuple[Callable, Callable] | None:
    """Return pack and unpack of the innermost hooks on saved tensors, or None if there are none.

    RuntimeError if this torch cannot say.
    """
    top = _find("_autograd._top_saved_tensors_default_hooks")
    if top is None:
        raise RuntimeError(f"torch {torch.__version__} does not tell its hooks on saved tensors")
    return top(False)


def storage_key(tensor: torch.Tensor) -> int:
    """Return a number that tells the tensor's storage from every other living storage."""
    storage = tensor.untyped_storage()
    return getattr(storage, "_cdata", None) or storage.data_ptr()


def onednn_bias_linear() -> Any:
    """Return oneDNN's product with a bias, or None if this torch or processor has none in bf16."""
    mkldnn = torch.backends.mkldnn
    if not enabled or _mkldnn_enabled is None or not mkldnn.is_available():
        return None
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if supported is None or not supported():
        return None
    return getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


def onednn_enabled() -> bool:
    """True if torch may use oneDNN now."""
    return _mkldnn_enabled is not None and _mkldnn_enabled()


def onednn_multiplies(dtype: torch.dtype) -> bool | None:
    """True if torch leaves matrix products of a half-precision dtype to oneDNN on this processor.

    None if this torch does not say.
    """
    if not enabled or _mkldnn_enabled is None:
        return None
    supported = _onednn_supports(dtype)
    return supported and onednn_enabled()


@functools.cache
def _onednn_supports(dtype: torch.dtype) -> bool | None:
    """What torch itself asks before it hands a product of the dtype to oneDNN."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return supported and supported()


def foreach(name: str) -> Callable:
    """Return torch._foreach_<name>, or a loop over torch.Tensor.<name> where it is missing."""
    fused = getattr(torch, f"_foreach_{name}", None)
    if fused is not None and enabled:
        return fused
    single = getattr(torch.Tensor, name)

    def loop(tensors: list[torch.Tensor], *arguments: Any, **options: Any) -> list[torch.Tensor]:
        rows = (
            [a[i] if isinstance(a, list | tuple) else a for a in arguments]
            for i in range(len(tensors))
        )
        return [single(tensor, *row, **options) for tensor, row in zip(tensors, rows, strict=True)]

    return loop


def allocations(profile: Any) -> list[tuple[int, int, int]]:
    """Return (time in ns, address, bytes; negative where freed) of a profile's allocations."""
    events = []
    nodes = list(profile.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children)
        if node.tag.name == "Allocation":
            fields = node.extra_fields
            events.append((node.start_time_ns, fields.ptr, fields.alloc_size))
    return sorted(events)


def raw_stream() -> Callable[[int], int]:
    """Return the function from a CUDA device's index to the handle of torch's current stream."""
    quick = _find("_cuda_getCurrentRawStream") if enabled else None
    return quick or (lambda index: torch.cuda.current_stream(index).cuda_stream)


def has_gradient_hooks(tensor: torch.Tensor) -> bool:
    """Return True if something is to be called when the tensor gets its gradient."""
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(tensor, name, None) for name in names)


# The attributes of nn.Module that hold the hooks of its call, and how these are called.
CALL_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def has_call_hooks(module: torch.nn.Module) -> bool:
    """Return True if the call of the module runs a hook, its own or one of all modules."""
    every = vars(torch.nn.modules.module)
    return any(vars(module).get(name) for name in CALL_HOOKS) or any(
        every.get(f"_global{name}") for name in CALL_HOOKS
    )


def share_call_hooks(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Let the call of target run the hooks of source. Their handles then remove them from both."""
    for name in (*CALL_HOOKS, "_is_full_backward_hook"):
        if name in vars(source):
            vars(target)[name] = vars(source)[name]


def is_foreign_subclass(tensor: torch.Tensor) -> bool:
    """True if another library computes with the tensor, as torchao does with a quantised weight."""
    return any(
        "__torch_dispatch__" in vars(base) and base.__module__.partition(".")[0] != "torch"
        for base in type(tensor).__mro__
    )
