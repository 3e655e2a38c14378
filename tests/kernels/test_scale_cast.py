"""scale_cast: factors cast, scaled, padded, and rounded once."""

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


def test_a_factor_that_needs_no_change_is_returned_itself():
    F = torch.randn(8, 16)
    assert scale_cast(F, torch.float32) is F
    assert scale_cast(F.t(), torch.float32, by_row=False).data_ptr() == F.data_ptr()
    assert scale_cast(F, torch.float32, by_row=False) is not F
    assert scale_cast(F, torch.float32, multiple=16) is F
