"""What is known of devices, and of the errors that they raise."""

import pytest
import torch

from lorafast.runtime import devices


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at a.cpp:1] DefaultCPUAllocator: can't allocate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_recognised_by_its_message(error, expected):
    assert devices.is_out_of_memory(error) == expected
