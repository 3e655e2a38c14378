"""lorafast.spectral_ranks: a rank for each layer by the spectrum of its weight, once, before training; LaMDA++ (arXiv 2406.12832).

    E(r) = Σ_{i≤r} σᵢ² / Σ σᵢ²        the share of a weight's energy that its first r singular triplets hold
The paper names the idea (one SVD a layer, a normalised energy score, static ranks from a small set under a budget). Its formula,
the rank it scores at, which end of the order gets more, and how the budget is spent could not be checked against its text: they
are this file's own, and no fidelity is claimed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

import torch
from torch import nn

from lorafast.engine import checks
from lorafast.methods import svd
from lorafast.methods.lora import LoRA
from lorafast.models.adapt_spec import ALL_LINEAR, Names, Plan, matching
from lorafast.models.module_names import clean
from lorafast.models.target_modules import places

DIRECTIONS = ("low_energy_more", "high_energy_more")


def spectral_ranks(
    model: nn.Module,
    ranks: Collection[int] = (8, 16, 32),
    budget: float | None = None,
    energy_rank: int | None = None,
    direction: str = "low_energy_more",
    target_modules: Names = ALL_LINEAR,
    *,
    exclude_modules: Names | None = None,
    svd_niter: int | None = None,
) -> dict[str, int]:
    """{layer: r}, r from `ranks`, as adapt(model, adapter, rank_pattern=...) takes it: for LaMDA, or any adapter with an r a layer.

    budget: the most the mean rank may be (None: the middle one of ranks); of all ways that keep the order, one that uses most of
    it, and among those the one with most layers at the largest rank, then at the next. energy_rank: the r of E (None: the smallest
    of ranks, so that E says what the least adapter could hold of the layer). direction: "low_energy_more" gives larger ranks where
    E is smaller, the rest of the spectrum being longer; "high_energy_more" the other way round. Layers of equal E keep the model's
    order. No rank exceeds min(N,K) of its layer. target_modules, exclude_modules: as in adapt. svd_niter: as in LaMDA.
    The model is only read. ValueError or TypeError where adapt raises one, and for a budget below what the smallest ranks need.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    choice = _refused_or_sorted(ranks, energy_rank, budget)
    checks.word("direction", direction, DIRECTIONS)
    svd.iterations(svd_niter)
    found = places(model, Plan(LoRA(), target_modules, exclude_modules=exclude_modules))
    weights = {clean(names[0]): module.weight.detach() for module, names in found.items()}
    if meta := next((name for name, weight in weights.items() if weight.is_meta), None):
        raise ValueError(
            f"{meta}.weight {tuple(weights[meta].shape)} is on the meta device: load it first"
        )
    score = {
        name: energy(weight, energy_rank or choice[-1], svd_niter)
        for name, weight in weights.items()
    }
    order = sorted(score, key=score.get, reverse=direction == "high_energy_more")
    limit = choice[len(choice) // 2] if budget is None else budget
    given = dict(
        zip(order, _spent(choice, [min(weights[name].shape) for name in order], limit), strict=True)
    )
    return _patterns({name: given[name] for name in weights})


def energy(weight: torch.Tensor, r: int, svd_niter: int | None = None) -> float:
    """E(r) of a weight [N,K], in [0, 1]; 1 where r is all there is, or where the weight is 0."""
    total = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
    if not total or r >= min(weight.shape):
        return 1.0
    return min(1.0, float(svd.top(weight, r, svd_niter)[1].double().square().sum()) / total)


def _refused_or_sorted(
    ranks: Collection[int], energy_rank: int | None, budget: float | None
) -> list[int]:
    """The ranks without repetitions, largest first."""
    numbers = [*ranks] if isinstance(ranks, Collection) and not isinstance(ranks, str) else []
    if not numbers or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in numbers):
        raise ValueError(f"ranks={ranks!r} must be integers of at least 1")
    if energy_rank is not None:
        checks.whole("energy_rank", energy_rank)
    if budget is not None and (
        isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < math.inf
    ):
        raise ValueError(f"budget={budget!r} must be a positive number, the largest mean rank")
    return sorted(set(numbers), reverse=True)


def _spent(choice: Sequence[int], caps: Sequence[int], budget: float) -> list[int]:
    """A rank for every layer: never rising along the order but where a cap says so, and of the largest sum the budget allows."""
    n, most = len(caps), math.floor(budget * len(caps) + 1e-9)
    within = (1 << (most + 1)) - 1
    # Bit t of sums[j][i]: layers i… can have ranks of sum t, none larger than choice[j].
    sums = [[0] * n + [1] for _ in choice]
    for j in reversed(range(len(choice))):
        for i in reversed(range(n)):
            here = sums[j][i + 1] << min(choice[j], caps[i]) & within
            sums[j][i] = here | (sums[j + 1][i] if j + 1 < len(choice) else 0)
    left, j, given = sums[0][0].bit_length() - 1, 0, []
    if left < 0:
        least = sum(min(choice[-1], cap) for cap in caps)
        raise ValueError(
            f"budget={budget} is a sum of {most} for {n} layers; ranks of at least {choice[-1]} take {least}"
        )
    for i, cap in enumerate(caps):
        while min(choice[j], cap) > left or not sums[j][i + 1] >> left - min(choice[j], cap) & 1:
            j += 1
        given.append(min(choice[j], cap))
        left -= given[-1]
    return given


def _patterns(ranks: dict[str, int]) -> dict[str, int]:
    """By patterns that match their layers alone; a name may also be the end of another."""
    found = matching(ranks, ranks)
    return (
        ranks
        if all(found[name] == name for name in ranks)
        else {f"^{re.escape(name)}": r for name, r in ranks.items()}
    )
