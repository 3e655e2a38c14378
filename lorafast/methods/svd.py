"""The top singular triplets of a weight."""

from __future__ import annotations

import torch

# Up to here the exact SVD takes about a second on two cores.
EXACT_UP_TO = 1024
ITERATIONS = 16
MOST = 100  # nothing is gained long before


def iterations(niter: int | None) -> None:
    """Refuse what is no number of iterations."""
    if niter is not None and (
        isinstance(niter, bool) or not isinstance(niter, int) or not 0 <= niter <= MOST
    ):
        raise ValueError(f"svd_niter={niter!r} must be None or an integer in 0…{MOST}")


def top(
    weight: torch.Tensor, r: int, niter: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [N,r], S [r], Vᵀ [r,K], largest first, in fp32 (fp64 for fp64).

    niter=None is exact while min(N,K) ≤ 1024, else 16 subspace iterations; 0 is always exact, n > 0 always n iterations. The
    randomised form always draws the same numbers and leaves torch's generators as they were.
    """
    if r > min(weight.shape):
        raise ValueError(
            f"r={r} exceeds min(N, K)={min(weight.shape)} of weight {tuple(weight.shape)}, as many as an SVD has; "
            "take a smaller r, or an init without an SVD"
        )
    wide = weight if weight.dtype == torch.float64 else weight.float()
    exact = niter == 0 or (niter is None and min(weight.shape) <= EXACT_UP_TO)
    if exact:
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
        return U[:, :r], S[:r], Vh[:r]
    q = min(r + 8, *weight.shape)
    # torch.manual_seed would reseed every GPU; only the generator that is put back afterwards may be touched.
    generator = (
        torch.cuda.default_generators[weight.device.index]
        if weight.is_cuda
        else torch.default_generator
    )
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        generator.manual_seed(0)
        U, S, V = torch.svd_lowrank(wide, q=q, niter=niter or ITERATIONS)
    return U[:, :r], S[:r], V[:, :r].t()
