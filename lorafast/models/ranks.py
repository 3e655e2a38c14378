"""lorafast.spectral_ranks: a rank for each layer from the spectrum of its weight (LaMDA++).

    E(r) = Σ_{i≤r} σᵢ² / Σ σᵢ²        the share of a weight's energy in its first r singular values

LaMDA++ (arXiv:2406.12832) names the idea: before training, one SVD a layer, a normalised energy
score, and ranks from a small set under a budget. Its exact formula, the r of its score, which end
of the order gets larger ranks, and how the budget is spent could not be checked against its text:
they are this file's own choices, and no fidelity is claimed.
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
from lorafast.models.adapt import weight_matrix, weight_shape
from lorafast.models.adapt_spec import AdaptSpec, match_patterns
from lorafast.models.module_names import canonical_name, require_module
from lorafast.models.target_modules import find_targets
from lorafast.quantised import formats

DIRECTIONS = ("low_energy_more", "high_energy_more")


def spectral_ranks(
    model: nn.Module,
    ranks: Collection[int] = (8, 16, 32),
    budget: float | None = None,
    energy_rank: int | None = None,
    direction: str = "low_energy_more",
    target_modules: str | Collection[str] = "all-linear",
    *,
    exclude_modules: str | Collection[str] | None = None,
    svd_niter: int | None = None,
) -> dict[str, int]:
    """Return a rank for each targeted layer, for the rank_pattern of lorafast.adapt.

    Layers are ordered by the energy E(r) that the first r singular values of their weight hold
    (layers of equal E in model order); ranks never rise along that order. Of all such ranks within
    the budget, those of the largest sum are taken; among them, those with most layers at the
    largest rank, then at the next. No rank exceeds min(N, K) of its layer.

    Args:
        model: a model that is not adapted yet; it is only read.
        ranks: the ranks to choose from.
        budget: the largest mean rank allowed; None is the middle one of ranks.
        energy_rank: the r of E(r); None is the smallest of ranks.
        direction: "low_energy_more" gives larger ranks to layers of smaller E, whose spectrum is
            longer; "high_energy_more" to layers of larger E.
        target_modules: as in lorafast.adapt.
        exclude_modules: as in lorafast.adapt.
        svd_niter: subspace iterations of the SVD, 0 for an exact one; None chooses, as in LaMDA.

    Returns:
        {pattern: r}, in module order. A pattern is the layer's name, or an expression for it where
        the name is also the end of another layer's name.

    Raises:
        ValueError: as lorafast.adapt; a wrong argument, a weight on the meta device, or a budget
            below what the smallest ranks need.
        TypeError: as lorafast.adapt.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 16))
        ranks = lorafast.spectral_ranks(model, ranks=(2, 4), budget=3)
        lorafast.adapt(model, lorafast.LaMDA(r=4), rank_pattern=ranks)

    Source:
        arXiv:2406.12832 (LaMDA++), with the reservations above.
    """
    require_module(model)
    choices = _check_numbers(ranks, energy_rank, budget)
    checks.word("direction", direction, DIRECTIONS)
    svd.check_niter(svd_niter)
    spec = AdaptSpec(LoRA(), target_modules, exclude_modules=exclude_modules)
    targets = {
        canonical_name(names[0]): module for module, names in find_targets(model, spec).items()
    }
    _refuse_meta({name: formats.held_weight(module) for name, module in targets.items()})
    score_rank = energy_rank or choices[-1]
    scores = {
        name: energy(weight_matrix(module), score_rank, svd_niter)
        for name, module in targets.items()
    }
    order = sorted(scores, key=scores.get, reverse=direction == "high_energy_more")
    mean_rank = choices[len(choices) // 2] if budget is None else budget
    caps = [min(weight_shape(targets[name])) for name in order]
    chosen = dict(zip(order, allocate(choices, caps, mean_rank), strict=True))
    return _as_patterns({name: chosen[name] for name in targets})


def energy(weight: torch.Tensor, r: int, svd_niter: int | None = None) -> float:
    """Return E(r) of a weight [N,K], in [0, 1]; 1 if r is at least min(N, K) or the weight is 0."""
    total = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
    if not total or r >= min(weight.shape):
        return 1.0
    _, S, _ = svd.truncated_svd(weight, r, svd_niter)
    return min(1.0, float(S.double().square().sum()) / total)


def _check_numbers(
    ranks: Collection[int], energy_rank: int | None, budget: float | None
) -> list[int]:
    """Return the distinct ranks, largest first. ValueError if one of the arguments is wrong."""
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


def _refuse_meta(weights: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        if weight.is_meta:
            raise ValueError(
                f"{name}.weight {tuple(weight.shape)} is on the meta device: load it first"
            )


def allocate(choices: Sequence[int], caps: Sequence[int], budget: float) -> list[int]:
    """Return a rank for each layer: not rising, except for caps, of the largest sum allowed.

    Args:
        choices: the ranks to choose from, largest first.
        caps: the largest rank each layer can have, in the order of the layers.
        budget: the largest mean rank.

    Raises:
        ValueError: the smallest ranks exceed the budget.
    """
    layers, most = len(caps), math.floor(budget * len(caps) + 1e-9)
    mask = (1 << (most + 1)) - 1
    # Bit t of sums[j][i] is 1 if the layers i and following can have ranks of sum t, none of them
    # chosen larger than choices[j].
    sums = [[0] * layers + [1] for _ in choices]
    for j in reversed(range(len(choices))):
        for i in reversed(range(layers)):
            with_choice = sums[j][i + 1] << min(choices[j], caps[i]) & mask
            with_smaller = sums[j + 1][i] if j + 1 < len(choices) else 0
            sums[j][i] = with_choice | with_smaller
    # The highest bit of sums[0][0] is the largest sum within the budget. Follow it back.
    remaining, j, ranks = sums[0][0].bit_length() - 1, 0, []
    if remaining < 0:
        least = sum(min(choices[-1], cap) for cap in caps)
        raise ValueError(
            f"budget={budget} is a sum of {most} for {layers} layers; ranks of at least "
            f"{choices[-1]} take {least}"
        )
    for i, cap in enumerate(caps):
        while not _fits(sums[j][i + 1], remaining - min(choices[j], cap)):
            j += 1
        ranks.append(min(choices[j], cap))
        remaining -= ranks[-1]
    return ranks


def _fits(reachable: int, total: int) -> bool:
    """True if the bit of a sum is set in the reachable sums."""
    return total >= 0 and bool(reachable >> total & 1)


def _as_patterns(ranks: dict[str, int]) -> dict[str, int]:
    """Return the ranks under patterns that match one layer each.

    A name is such a pattern unless it is also the end of another name.
    """
    matches = match_patterns(ranks, ranks)
    if all(matches[name] == name for name in ranks):
        return ranks
    return {f"^{re.escape(name)}": r for name, r in ranks.items()}
