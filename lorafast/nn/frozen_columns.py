"""Freezing of the first columns of a factor B [N,R] or [E,N,R], as LaMDA's schedule does it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from lorafast.nn import unscheduled


class FrozenColumns(nn.Module):
    """A module that holds a factor B [...,N,R] whose first columns can be frozen.

    Attributes:
        frozen_columns: how many columns are frozen.
        freezing: True from begin_freezing() or the first frozen column on, until unfreeze().
    """

    frozen_columns: int = 0
    freezing: bool = False
    # True if freezing all columns turned B's gradient off.
    _froze_B: bool = False
    # The values of the frozen columns while others train; and which columns train, bool [R], which
    # exists while freezing is True.
    frozen_B: torch.Tensor | None
    trained_columns: torch.Tensor | None

    def _factor_B(self) -> nn.Parameter:
        """Return B."""
        raise NotImplementedError

    def _needs_schedule(self) -> bool:
        """True if the method of the adapter freezes B by a schedule."""
        raise NotImplementedError

    @property
    def trains(self) -> bool:
        """True if B trains, or did until all its columns were frozen."""
        return self._factor_B().requires_grad or self._froze_B

    def _register_columns(self) -> None:
        """Register the buffers; in no state dict."""
        self.register_buffer("frozen_B", None, persistent=False)
        self.register_buffer("trained_columns", None, persistent=False)

    def _expect_schedule(self) -> None:
        """Let a step that trains B warn, unless a schedule freezes B or the method has none."""
        if self._needs_schedule():
            unscheduled.expect_schedule(self)

    def begin_freezing(self) -> None:
        """Let every column train, and prepare for freeze_columns().

        From here on compiled code does not depend on how many columns are frozen.
        """
        self.freezing = True
        self.freeze_columns(0)

    def unfreeze(self) -> None:
        """Let train again what a schedule froze."""
        self.freeze_columns(0)
        self.freezing, self.trained_columns = False, None

    @torch.no_grad()
    def freeze_columns(self, count: int) -> None:
        """Freeze the first columns of lora_B at their values: no gradient, and no work for one.

        An optimizer may still move them by momentum or weight decay; restore_columns() after its
        step undoes that. Once all are frozen, lora_B.requires_grad is False and there is nothing
        to restore. In a process group lora_B keeps its (zero) gradient, because a DDP reducer that
        was built with it waits for it.

        Args:
            count: number of columns, from 0 to r.

        Raises:
            ValueError: count is out of range.
        """
        B = self._factor_B()
        r = B.shape[-1]
        if not isinstance(count, int) or not 0 <= count <= r:
            raise ValueError(
                f"count={count!r} must be between 0 and r={r} for lora_B {tuple(B.shape)}"
            )
        if count and not self.freezing:
            self.begin_freezing()
        whole = count == r and not (dist.is_available() and dist.is_initialized())
        if whole and B.requires_grad:
            B.requires_grad_(False)
            B.grad = None
            self._froze_B = True
        elif not whole and self._froze_B:
            B.requires_grad_(True)
            self._froze_B = False
        self.frozen_columns = count
        keep = count > 0 and not whole
        self.frozen_B = B[..., :count].detach().clone() if keep else None
        if self.freezing:
            self._write_mask(torch.arange(r, device=B.device) >= count)

    @torch.no_grad()
    def restore_columns(self) -> None:
        """Write the frozen columns of lora_B back, bit for bit."""
        if self.frozen_B is not None:
            self._factor_B()[..., : self.frozen_columns].copy_(self.frozen_B)

    def _write_mask(self, mask: torch.Tensor) -> None:
        old = self.trained_columns
        if old is None or old.shape != mask.shape or old.device != mask.device:
            self.trained_columns = mask
        else:
            # In place, because a CUDA graph reads it at one address.
            old.copy_(mask)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        # Of a layer pickled by version 0.1.
        if "trained_columns" not in self._buffers:
            self.register_buffer("trained_columns", None, persistent=False)
            if self.frozen_columns:
                self.freeze_columns(self.frozen_columns)
        self._expect_schedule()

    def _call_columns(self, B: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return B for a call, and how many of its first columns the call gives no gradient."""
        if torch.compiler.is_compiling():
            # A number would be part of the compiled code, and each change would compile again.
            return self._masked(B), 0
        return B, self.frozen_columns

    def _masked(self, B: torch.Tensor) -> torch.Tensor:
        """Return B, whose gradient is 0 in the frozen columns."""
        assert self.trained_columns is not None
        return torch.where(self.trained_columns, B, B.detach())
