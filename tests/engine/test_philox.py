"""The dropout bits: known answers, Triton's own generator, and independence of tiling."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from lorafast.engine import philox  # noqa: E402
from lorafast.engine.kernels.philox import drop_tile, keep_tile  # noqa: E402

SEEDS = (0, 1, 2**32 + 5, 2**63 - 2)
# Rows of one group each whose counters are on both sides of 2³¹, 2³² and 2³³.
BORDERS = [2**31 - 9, 2**32 - 9, 2**33 - 9]


@triton.jit
def _words_kernel(seed_ptr, counter_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = tl.randint4x(tl.load(seed_ptr), tl.load(counter_ptr + offs), 7)
    tl.store(out_ptr + offs, w0)
    tl.store(out_ptr + BLOCK + offs, w1)
    tl.store(out_ptr + 2 * BLOCK + offs, w2)
    tl.store(out_ptr + 3 * BLOCK + offs, w3)


@triton.jit
def _keep_kernel(
    seed_ptr, out_ptr, threshold, M, groups, first_row, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1) * GROUPS
    kept = keep_tile(
        tl.load(seed_ptr), rows.to(tl.int64) + first_row, group, groups, threshold, GROUPS
    )
    cols = group * 8 + tl.arange(0, GROUPS * 8)
    inside = (rows < M)[:, None] & (cols < groups * 8)[None, :]
    tl.store(out_ptr + rows[:, None] * (groups * 8) + cols[None, :], kept.to(tl.int8), mask=inside)


@triton.jit
def _drop_kernel(
    x_ptr, seed_ptr, out_ptr, threshold, groups, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    where = rows[:, None] * (GROUPS * 8) + tl.arange(0, GROUPS * 8)[None, :]
    x = tl.load(x_ptr + where)
    x = drop_tile(x, tl.load(seed_ptr), rows, 0, groups, threshold, GROUPS)
    tl.store(out_ptr + where, x)


@pytest.mark.parametrize("seed", SEEDS)
def test_words_equal_tritons(seed):
    counter = torch.tensor([0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 12345])
    out = torch.zeros(4, 8, dtype=torch.int32)
    _words_kernel[(1,)](torch.tensor([seed]), counter, out, 8)
    want = torch.stack(philox.words(torch.tensor([seed]), counter))
    assert torch.equal(out.long() & 0xFFFFFFFF, want)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("K", [1, 7, 64, 100])
@pytest.mark.parametrize("first_row", [0, 2**31 - 5, 2**32 - 5, 2**33])
def test_the_mask_equals_the_kernels(seed, K, first_row):
    M, groups, p = 21, -(-K // 8), 0.3
    out = torch.empty(M, groups * 8, dtype=torch.int8)
    grid = (triton.cdiv(M, 16), triton.cdiv(groups, 4))
    _keep_kernel[grid](torch.tensor([seed]), out, philox.threshold(p), M, groups, first_row, 16, 4)
    assert torch.equal(
        out[:, :K].bool(),
        philox.keep_mask(torch.tensor([seed]), p, slice(first_row, first_row + M), K),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("t", [1, 3277, 0x7FFF, 0x8000, 0x8001, 65535])
def test_a_tile_drops_what_is_below_the_threshold(t, dtype):
    M, K, seed = 256, 2048, torch.tensor([2**63 - 5])
    # A kept number keeps its bits, and a dropped NaN is 0.
    x, out = torch.randn(M, K).to(dtype), torch.empty(M, K, dtype=dtype)
    kept = philox.keep_mask(seed, t / 65536, slice(0, M), K)
    x[~kept] = torch.nan
    _drop_kernel[(M // 32,)](x, seed, out, t, K // 8, 32, K // 8)
    assert torch.equal(out, torch.where(kept, x, 0.0))


@pytest.mark.parametrize("seed", [*SEEDS, 2**31, 2**32 - 1, 2**63 - 1])
@pytest.mark.parametrize("first_row", [0, *BORDERS, 2**50 + 3])
@pytest.mark.parametrize("K", [1, 8, 20])
def test_a_traced_mask_has_the_same_bits(seed, first_row, K, monkeypatch):
    # A seed may be one of many.
    many, rows = torch.tensor([[3, seed], [4, 5]]), slice(first_row, first_row + 20)
    p = 1 - 1 / 65536 if K == 8 else 0.4
    whole = philox.keep_mask(many[:1, 1], p, rows, K)
    assert whole.is_contiguous()
    monkeypatch.setattr(philox, "CPU_CALLS", 7)
    assert torch.equal(philox.keep_mask(torch.tensor([seed]), p, rows, K), whole)
    traced = torch.func.vmap(lambda _: philox.keep_mask(torch.tensor([seed]), p, rows, K))
    assert torch.equal(traced(torch.zeros(1))[0], whole)


class _StorageSizes(TorchDispatchMode):
    """The bytes behind every tensor that an operation below it returns."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        self.sizes |= {tensor.untyped_storage().nbytes() for tensor in tensors}
        return out


def test_no_temporary_grows_with_the_mask():
    seed, (M, K) = torch.empty(1, dtype=torch.int64, device="meta"), (1 << 17, 4096)
    with _StorageSizes() as seen:
        assert philox.keep_mask(seed, 0.05, slice(0, M), K).shape == (M, K)
    largest, *others = sorted(seen.sizes, reverse=True)
    assert largest == M * K
    assert max(others) == 32 * philox.CALLS < M * K / 10


def test_ten_rounds_of_the_same_code_give_the_published_answer():
    # Random123's known-answer file, philox4x32-10 with a zero key and a zero counter.
    rounds, philox.ROUNDS = philox.ROUNDS, 10
    try:
        words = philox.words(torch.tensor([0]), torch.tensor([0]))
    finally:
        philox.ROUNDS = rounds
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_bits_depend_on_seed_row_and_column_alone():
    seed, K = torch.tensor([99]), 50
    whole = philox.keep_mask(seed, 0.5, slice(0, 40), K)
    assert torch.equal(whole[17:23], philox.keep_mask(seed, 0.5, slice(17, 23), K))
    assert not torch.equal(whole, philox.keep_mask(seed + 1, 0.5, slice(0, 40), K))
    assert not torch.equal(whole[:20], whole[20:])


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_kept_and_its_scale(p):
    kept = philox.keep_mask(torch.tensor([7]), p, slice(0, 1000), 1000).double().mean().item()
    assert abs(kept - (1 - p)) < 6 * (p * (1 - p) / 1e6) ** 0.5
    assert philox.scale(p) == 65536 / (65536 - round(p * 65536))


@pytest.mark.parametrize("p", [1e-6, 1 - 1e-6])
def test_a_share_that_16_bits_cannot_tell_is_refused(p):
    with pytest.raises(ValueError, match="65536"):
        philox.threshold(p)


def test_seeds_are_drawn_from_torchs_generator():
    torch.manual_seed(5)
    first, second = philox.draw_seed(torch.device("cpu")), philox.draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(philox.draw_seed(torch.device("cpu")), first)
    assert first.dtype == torch.int64
    assert first.shape == (1,)
    assert first.item() != second.item()
    assert max(philox.draw_seed(torch.device("cpu")).item() for _ in range(20)) > 2**60
