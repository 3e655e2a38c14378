"""Starts that read the weight: what init may be besides a word."""

from __future__ import annotations

import torch


class Start:
    """A start of A and B from the weight, after which the weight gives up what they make of it: W becomes W - sBA."""

    def factors(self, weight: torch.Tensor, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r,K] and B [N,r] for weight [N,K], on its device."""
        raise NotImplementedError
