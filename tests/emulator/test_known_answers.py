"""The emulator against kernels with known answers, and the faults that it must see."""

import pytest
import torch

from emulator import driver, kernels
from emulator.memory import Fault
from emulator.process import in_emulator
from emulator.tma import TensorMap

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# M, N, K and stages; blocks are 64×64×32.
BY_POINTERS = [
    (64, 64, 64, 3),
    (130, 72, 257, 3),
    (128, 128, 192, 3),
    (17, 40, 72, 2),
    (70, 144, 272, 4),
]
# M, N, K, the blocks and warps. Rows of boxes have 128, 64 and 32 bytes.
BY_TMA = [
    (64, 64, 64, (64, 64, 64), 4),
    (130, 72, 264, (128, 128, 64), 8),
    (200, 264, 128, (128, 256, 64), 8),
    (64, 64, 64, (64, 32, 32), 4),
    (70, 40, 48, (64, 16, 16), 4),
]


def first_or_slow(cases):
    """Return pytest's parameters: the first case, and the others marked slow."""
    return [pytest.param(case, marks=[pytest.mark.slow] * bool(i)) for i, case in enumerate(cases)]


def check(found, a, b, dtype):
    """Assert that a product is as exact as that of torch, whose sums have another order."""
    truth, by_torch = a.double() @ b.double(), a @ b
    errors = [(one.double() - truth).square().mean().sqrt() for one in (found, by_torch)]
    floor = torch.finfo(dtype).eps / 8 * truth.square().mean().sqrt()
    assert errors[0] <= 2 * max(errors[1], floor), errors


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("capability", [80, 90])
@in_emulator
def test_sums_are_exact_bit_for_bit(capability, dtype):
    x, y, out = (
        torch.randn(1000).to(dtype),
        torch.randn(1000).to(dtype),
        torch.empty(1000).to(dtype),
    )
    with driver.emulating(capability):
        kernels.add_kernel[(4,)](x, y, out, 1000, 256)
    assert torch.equal(out, (x.float() + y.float()).to(dtype))


@pytest.mark.parametrize("shape", first_or_slow(BY_POINTERS))
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("capability", [80, 90])
@in_emulator
def test_products_by_pointers(capability, dtype, shape):
    M, N, K, stages = shape
    a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.empty(M, N).to(dtype)
    grid = -(-M // 64), -(-N // 64)
    with driver.emulating(capability):
        kernels.product_kernel[grid](a, b, c, M, N, K, 64, 64, 32, num_stages=stages)
    check(c, a, b, dtype)


@pytest.mark.parametrize("case", first_or_slow(BY_TMA))
@pytest.mark.parametrize(("by_row", "dtype"), [(True, BF16), (False, BF16), (False, FP16)])
@in_emulator
def test_products_by_tma(by_row, dtype, case):
    from triton.tools.tensor_descriptor import TensorDescriptor

    M, N, K, (block_m, block_n, block_k), warps = case
    a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.empty(M, N).to(dtype)
    if by_row:
        right = TensorDescriptor.from_tensor(b.t().contiguous(), [block_n, block_k])
    else:
        right = TensorDescriptor.from_tensor(b, [block_k, block_n])
    left, out = (
        TensorDescriptor.from_tensor(t, [block_m, block])
        for t, block in ((a, block_k), (c, block_n))
    )
    with driver.emulating(90):
        kernels.tma_product_kernel[(2,)](
            left, right, out, M, N, K, by_row, block_m, block_n, block_k,
            num_warps=warps, num_stages=3,
        )  # fmt: skip
    check(c, a, b, dtype)


@pytest.mark.parametrize("capability", [80, 90])
@in_emulator
def test_an_access_beyond_a_tensor_is_seen(capability):
    x, y, out = torch.randn(1000)[:900], torch.randn(1000), torch.empty(1000)
    with (
        driver.emulating(capability),
        pytest.raises(
            Fault, match=r"global access out of bounds: .*ld\.global.* bytes from the end"
        ),
    ):
        kernels.add_kernel[(4,)](x, y, out, 1000, 256)


@pytest.mark.parametrize("capability", [80, 90])
@in_emulator
def test_a_misaligned_access_is_seen(capability):
    """A kernel compiled for aligned tensors, launched on one that is not."""
    x, y, out = torch.randn(1040), torch.randn(1024), torch.empty(1024)
    with driver.emulating(capability):
        compiled = kernels.add_kernel[(1,)](x, y, out, 1024, 1024)
        with pytest.raises(Fault, match="misaligned global access"):
            compiled[(1, 1, 1)](x[3:], y, out, 1024, 1024)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"base": 130}, "address 0x82 is no multiple of 16"),
        ({"strides": [68, 1]}, r"strides \[68, 1\]"),
        ({"strides": [1 << 39, 1]}, "strides"),
        ({"strides": [32, 1]}, "overlapping"),
        ({"strides": [128, 2]}, "last stride 2"),
        ({"box": [512, 64]}, r"box \[512, 64\]"),
        ({"box": [64, 4]}, "box rows of 8 bytes"),
        ({"box": [64, 128]}, "box rows of 256 bytes in swizzle 3"),
        ({"shape": [0, 64]}, r"shape \[0, 64\]"),
    ],
)
def test_tensor_maps_that_cuda_refuses_are_refused(changed, reason):
    plain = {"base": 128, "swizzle": 3, "itemsize": 2, "box": [64, 64], "shape": [64, 64]}
    plain |= {"strides": [64, 1]}
    assert TensorMap(**plain).span == (128, 128 + 64 * 64 * 2)
    with pytest.raises(Fault, match=reason):
        TensorMap(**(plain | changed))


@pytest.mark.parametrize("capability", [80, 90])
@in_emulator
def test_a_product_in_flight_while_its_operand_is_overwritten_is_seen(capability):
    import triton

    M, N, R = 272, 320, 16
    a, b = torch.randn(M, N).bfloat16(), torch.randn(M, R).bfloat16()
    c, sums = torch.empty(N, R), torch.empty(N)

    def run():
        with driver.emulating(capability):
            kernels.product_and_sums_kernel[(2,)](
                a, b, c, sums, M, N, R, 64, 256, 16, num_warps=8, num_stages=2
            )

    if capability == 90:
        if not triton.__version__.startswith("3.7."):
            pytest.skip("other versions of Triton may wait for the product")
        with pytest.raises(Fault, match="write of what an asynchronous operation still reads: cp"):
            run()
        return
    run()
    torch.testing.assert_close(c, a.float().t() @ b.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums, a.float().sum(0), rtol=1e-4, atol=1e-4)
