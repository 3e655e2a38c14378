"""Which rows of an activation belong to which expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from lorafast.engine import philox
from lorafast.engine.problem import LayerTensors


class Groups(NamedTuple):
    """Rows that are sorted by expert, [S,·].

    offsets: int32 [E+1]; the rows of expert e are offsets[e] to offsets[e+1]. rows: int64 [S], the
    index of each row that decides which of its elements dropout drops; None: its own.
    """

    offsets: torch.Tensor
    rows: torch.Tensor | None = None

    @property
    def experts(self) -> int:
        """E."""
        return self.offsets.shape[0] - 1

    @property
    def ends(self) -> torch.Tensor:
        """The offsets as torch's grouped product takes them: where each expert's rows end, [E]."""
        return self.offsets[1:]

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has rows, and the rows. On a GPU the host waits for the offsets.

        An expert without rows contributes to no output.
        """
        bounds = self.offsets.tolist()
        for expert in range(len(bounds) - 1):
            if bounds[expert] < bounds[expert + 1]:
                yield expert, slice(bounds[expert], bounds[expert + 1])

    def check(self, S: int) -> None:
        """Check on a CPU that the offsets are those of S rows. On a GPU they are not read."""
        if not self.offsets.is_cpu:
            return
        bounds = self.offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != S or bounds != sorted(bounds):
            words = bounds if len(bounds) <= 9 else tuple(self.offsets.shape)
            raise ValueError(f"offsets {words} must rise from 0 to the {S} rows of x")

    def of_all_rows(self, S: int) -> torch.Tensor:
        """Return the expert of each of the S rows, int64 [S]."""
        index = torch.arange(S, dtype=self.offsets.dtype, device=self.offsets.device)
        return torch.bucketize(index, self.ends, right=True)

    def of_rows(self, per_expert: torch.Tensor, S: int) -> torch.Tensor:
        """Return per_expert [E,...] with an entry for each of the S rows, [S,...]."""
        return per_expert[self.of_all_rows(S)]

    def keep_mask(self, seed: torch.Tensor, p: float, rows: slice, K: int) -> torch.Tensor:
        """Return the mask of kept elements, bool [rows,K], of these of the sorted rows."""
        if self.rows is None:
            return philox.keep_mask(seed, p, rows, K)
        return philox.keep_mask_of_rows(seed, p, self.rows[rows], K)


def of_expert(tensors: LayerTensors, expert: int) -> LayerTensors:
    """Return the tensors of one expert. Those without a dim of experts are all experts'."""
    shared = {"lora_A": 2, "lora_B": 2, "seed": 1, "scale": 0}
    return LayerTensors(
        *(
            tensor if tensor is None or tensor.dim() == shared.get(name) else tensor[expert]
            for name, tensor in tensors._asdict().items()
        )
    )
