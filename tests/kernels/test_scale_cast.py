"""scale_cast: factors cast, scaled, padded, and rounded once."""

import math

import pytest
import torch

from lorafast.engine.kernels.scale_cast import scale_cast


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("row_scaled", [True, False])
@pytest.mark.parametrize("scaling", [1.0, 1.7, torch.tensor(1.7)], ids=["one", "number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("I", "J"), [(1, 1), (33, 5), (40, 64), (0, 4)])
def test_every_element_is_rounded_once(I, J, dtype, scaling, row_scaled, by_row):  # noqa: E741
    F = torch.randn(J, I).t()
    row_scale = torch.rand(I) if row_scaled else None
    ours = scale_cast(F, dtype, scaling, row_scale, by_row, multiple=8)
    assert ours.shape == (I, -(-J // 8) * 8)
    assert ours.stride(1 if by_row else 0) == 1
    assert not ours[:, J:].any()
    truth = F.double() * float(scaling) * (row_scale.double()[:, None] if row_scaled else 1)
    # In fp32 the two multiplications round, too.
    torch.testing.assert_close(
        ours[:, :J].double(), truth, rtol=1.1 * torch.finfo(dtype).eps, atol=1e-7
    )


def test_a_factor_in_tf32_is_rounded_to_nearest():
    F = torch.randn(40, 64) * torch.logspace(-30, 30, 64)
    ours = scale_cast(F, torch.float32, 1.7, tf32=True)
    scaled = F * 1.7
    assert not (ours.view(torch.int32) & 0x1FFF).any()
    assert ((ours - scaled).abs() <= 2.0**-11 * scaled.abs()).all()
    # Half of them up, half of them down.
    assert 0.4 < (ours.abs() > scaled.abs()).float().mean() < 0.6
    # The bits of a NaN may all be set, which a rounding would carry into the sign.
    odd = torch.tensor([[0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x800000, 0]], dtype=torch.int32)
    kept = scale_cast(odd.view(torch.float32), torch.float32, tf32=True)
    assert kept.isnan().tolist() == [[True, True, True, False, False, False]]
    assert kept[0, 3:].tolist() == [math.inf, -math.inf, 0.0]


def test_a_factor_that_needs_no_change_is_returned_itself():
    F = torch.randn(8, 16)
    assert scale_cast(F, torch.float32) is F
    assert scale_cast(F.t(), torch.float32, by_row=False).data_ptr() == F.data_ptr()
    assert scale_cast(F, torch.float32, by_row=False) is not F
    assert scale_cast(F, torch.float32, multiple=16) is F
