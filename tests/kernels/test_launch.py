"""TMA descriptors: which tensors can have one, and that Triton takes a cached one."""

import pytest
import torch

from lorafast.engine.kernels import launch, triton_internals


@pytest.mark.parametrize(
    ("tensor", "aligned"),
    [
        (torch.empty(4, 8, dtype=torch.float16), True),
        (torch.empty(8, 4, dtype=torch.float16).t(), False),
        (torch.empty(16, 8, dtype=torch.float16).t(), True),
        (torch.empty(4, 9, dtype=torch.float16), False),
        (torch.empty(4, 16, dtype=torch.float16)[:, 8:], True),
        (torch.empty(4, 16, dtype=torch.float16)[:, 4:12], False),
        (torch.empty(4, 16, dtype=torch.float16)[:, ::2], False),
        (torch.empty(0, 8, dtype=torch.float16), False),
        (torch.empty(1, 8, dtype=torch.float16).expand(4, 8), False),
        (torch.empty(4, 4), True),
        (torch.empty(4, 3), False),
    ],
)
def test_aligned(tensor, aligned):
    assert launch.aligned(tensor) == aligned


def test_a_cached_descriptor_has_the_type_of_a_new_one_and_keeps_no_tensor_alive():
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend
    from triton.tools.tensor_descriptor import TensorDescriptor

    W = torch.empty(64, 32, dtype=torch.bfloat16)
    new = TensorDescriptor(W, [64, 32], [32, 1], [16, 8])
    arguments = W.data_ptr(), W.dtype, (64, 32), 32, (16, 8)
    cached = launch._cached_descriptor(*arguments)
    assert launch._cached_descriptor(*arguments) is cached
    assert cached.base.data_ptr() == W.data_ptr()
    types = [native_specialize_impl(BaseBackend, one, False, True, True) for one in (new, cached)]
    assert types[0] == types[1]
    assert not isinstance(cached.base, torch.Tensor)


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("3.7.0", True), ("3.7.1", True), ("3.7.1+git5188153b", True), ("3.8.0", False),
        ("3.6.0", False), ("3.7.0.dev20260101", False), ("3.7", False), ("4.7.1", False),
    ],
)  # fmt: skip
def test_versions_of_triton_whose_private_symbols_are_used(version, tested):
    assert triton_internals.is_tested(version) == tested
