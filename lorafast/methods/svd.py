"""The truncated singular value decomposition (SVD) of a weight or a gradient."""

from __future__ import annotations

import torch

# An exact SVD of this many rows or columns takes about a second on two cores.
EXACT_LIMIT = 1024
DEFAULT_ITERATIONS = 16
# Far more subspace iterations than improve a result.
MAX_ITERATIONS = 100
# Columns of the random subspace beyond the rank.
_OVERSAMPLING = 8


def check_niter(niter: int | None) -> None:
    """Raise ValueError if niter is neither None nor a valid number of subspace iterations."""
    if niter is None:
        return
    if isinstance(niter, bool) or not isinstance(niter, int) or not 0 <= niter <= MAX_ITERATIONS:
        raise ValueError(f"svd_niter={niter!r} must be None or an integer in 0…{MAX_ITERATIONS}")


def truncated_svd(
    weight: torch.Tensor, r: int, niter: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the r largest singular triplets of a matrix, largest first.

    The randomized form draws the same numbers in every call and leaves torch's generators as they
    were.

    Args:
        weight: a matrix [N, K] of any floating dtype.
        r: the number of triplets.
        niter: None for an exact SVD up to min(N, K) = 1024 and 16 subspace iterations above it;
            0 for an exact SVD; n > 0 for n subspace iterations.

    Returns:
        U [N, r], S [r] and Vᵀ [r, K] in fp32, or fp64 for an fp64 matrix.

    Raises:
        ValueError: r is larger than min(N, K).
    """
    if r > min(weight.shape):
        raise ValueError(
            f"r={r} exceeds min(N, K)={min(weight.shape)} of weight {tuple(weight.shape)}, "
            "as many as an SVD has; take a smaller r, or an init without an SVD"
        )
    wide = weight if weight.dtype == torch.float64 else weight.float()
    if niter == 0 or (niter is None and min(weight.shape) <= EXACT_LIMIT):
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
        return U[:, :r], S[:r], Vh[:r]
    return _randomized_svd(wide, r, niter or DEFAULT_ITERATIONS)


def _randomized_svd(
    wide: torch.Tensor, r: int, niter: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # torch.manual_seed would reseed every GPU; only a generator that is restored may be seeded.
    if wide.is_cuda:
        generator = torch.cuda.default_generators[wide.device.index]
    else:
        generator = torch.default_generator
    with torch.random.fork_rng(devices=[wide.device] if wide.is_cuda else []):
        generator.manual_seed(0)
        q = min(r + _OVERSAMPLING, *wide.shape)
        U, S, V = torch.svd_lowrank(wide, q=q, niter=niter)
    return U[:, :r], S[:r], V[:, :r].t()
