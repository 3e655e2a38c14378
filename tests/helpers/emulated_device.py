"""CPU tensors that lorafast takes for tensors of a GPU, for the emulator and the recorder."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from lorafast.runtime import devices


@contextlib.contextmanager
def nvidia(capability: int) -> Iterator[None]:
    """Return a context in which every device has an architecture, such as 90 for sm_90."""
    arch = devices.Arch("nvidia", f"sm_{capability}")
    with mock.patch.object(devices, "of", return_value=arch):
        yield
