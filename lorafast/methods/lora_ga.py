"""LoRA-GA, low-rank adaptation with gradient approximation (arXiv:2407.05000)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch

from lorafast.engine import checks
from lorafast.methods import svd
from lorafast.methods.adapter import is_finite_number
from lorafast.methods.weight_init import WeightInit

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "gd", "unit", "weightS")


class LayerFactors(NamedTuple):
    """The singular vectors of a layer's gradient that its A and B start from, on the CPU.

    A [R, K] has orthonormal rows, B [N, R] orthonormal columns; S [R] are the singular values of
    B's columns.
    """

    A: torch.Tensor
    B: torch.Tensor
    S: torch.Tensor


@dataclass(frozen=True)
class LoRAGA(WeightInit):
    """LoRA-GA: an initialization whose first step follows the gradient of full fine-tuning.

        G = dL/dW = U Σ Vᵀ
        A = c · (r rows of Vᵀ)        B = c · (r other columns of U)        W becomes W - s B A

    A [R, K] and B [N, R] train; the output is unchanged at the start. To first order, a first SGD
    step changes W by -s² c² (G VₐVₐᵀ + U_bU_bᵀ G), with the triplets a of A and b of B. If these
    are together the first 2r triplets, it is the best change of rank 2r along -G. The authors use
    it with rslora=True. Nothing more than LoRA's tensors is saved for backward.
    `lorafast.save_adapter` writes a LoRA of rank 2r for the untouched weight.

    Two instances of the same settings are equal, whatever their gradients. A layer keeps the 2r
    vectors that it needs, on the CPU, and no gradient. In a process group every rank must pass the
    same gradients.

    Args:
        gradients: {layer name: G [N, K]} as `lorafast.estimate_gradients` returns it, or one G for
            `Linear.from_linear`.
        direction: the triplets, of G's first 2r, of A and of B. "ArB2r": the first r and the next
            r. "A2rBr": the reverse. "ArBr": every second one, from the second and from the first.
            "random": two halves, drawn from torch's generator when the layer is built.
        scale: the factor c. "stable": N^¼/√gamma. "gd": 1/s. "unit": 1. "weightS": the mean of
            √(σ/s) over the r largest singular values σ of W.
        gamma: the constant of scale="stable", above 0.
        svd_niter: None for an exact SVD up to min(N, K) = 1024 and 16 subspace iterations above it;
            0 for an exact SVD; n > 0 for n subspace iterations.
        compat: None, or "peft" for the initialization of PEFT's "lora_ga": B's columns times their
            singular values, "stable" scales B alone, "weightS" (PEFT's "weight_svd") scales B alone
            by σ₁(W) over the singular value of B's first column, and "random" uses the same
            triplets for both. For a Conv1D PEFT's "stable" takes K for N; this one does not.
        norm_clip: True to scale A and B down alike until max|s B A| ≤ max|W|; not with compat.
        layer_factors: the vectors of one layer; `bind_layer` sets it.

    Raises:
        TypeError: gradients is neither a dict nor a tensor, or norm_clip is not a bool.
        ValueError: a field is out of range, or a gradient that a layer needs is missing, not
            finite, 0, of another shape, or of a rank below 2r.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
        batches = [torch.randn(16, 64) for _ in range(2)]
        gradients = lorafast.estimate_gradients(
            model, batches, lambda model, x: model(x).square().mean()
        )
        adapter = lorafast.LoRA(r=8, rslora=True, init=lorafast.LoRAGA(gradients))
        lorafast.adapt(model, adapter)

    Source:
        arXiv:2407.05000
    """

    gradients: Mapping[str, torch.Tensor] | torch.Tensor | None = field(
        default=None, repr=False, compare=False
    )
    direction: str = "ArB2r"
    scale: str = "stable"
    gamma: float = 16
    svd_niter: int | None = None
    compat: str | None = None
    norm_clip: bool = False
    layer_factors: LayerFactors | None = field(default=None, repr=False, compare=False)

    paper: ClassVar[str] = "arXiv 2407.05000"
    trains: ClassVar[str] = "A, B"
    keeps: ClassVar[str] = "x by reference + M·R"

    def __post_init__(self) -> None:
        if not isinstance(self.gradients, Mapping | torch.Tensor | None):
            raise TypeError(
                "gradients must be a dict from layer names to tensors, or a tensor, "
                f"not {self.gradients!r}"
            )
        checks.word("direction", self.direction, DIRECTIONS)
        checks.word("scale", self.scale, SCALES)
        if not is_finite_number(self.gamma) or self.gamma <= 0:
            raise ValueError(f"gamma={self.gamma!r} must be a positive number")
        svd.check_niter(self.svd_niter)
        if self.compat is not None:
            checks.word("compat", self.compat, ("peft",))
        if not isinstance(self.norm_clip, bool):
            raise TypeError(f"norm_clip={self.norm_clip!r} must be True or False")
        if self.norm_clip and self.compat:
            raise ValueError(
                "norm_clip=True belongs to the authors' form; PEFT has none: "
                "leave compat='peft' out"
            )

    def bind_layer(self, name: str, weight: torch.Tensor, r: int) -> LoRAGA:
        if self.layer_factors is not None:
            return self
        return replace(self, gradients=None, layer_factors=self._layer_factors(name, weight, r))

    def factors(
        self, weight: torch.Tensor, r: int, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bound = self.layer_factors or self._layer_factors("", weight, r)
        if (bound.A.shape, bound.B.shape) != ((r, weight.shape[1]), (weight.shape[0], r)):
            shapes = f"A {tuple(bound.A.shape)} and B {tuple(bound.B.shape)}"
            raise ValueError(
                f"{self} was made for {shapes}, not for r={r} and weight {tuple(weight.shape)}: "
                "make it anew"
            )
        A, B, S = (tensor.to(weight.device) for tensor in bound)
        if self.compat == "peft":
            B = B * S
        scale_A, scale_B = self._factor_scales(weight, r, scaling, S)
        A, B = A * scale_A, B * scale_B
        return self._clip(A, B, weight, scaling) if self.norm_clip else (A, B)

    def _layer_factors(self, name: str, weight: torch.Tensor, r: int) -> LayerFactors:
        """Return the vectors of one layer. Errors name the layer."""
        G = self._layer_gradient(name, weight, r)
        U, S, Vh = svd.truncated_svd(
            G if weight.is_meta else G.to(weight.device), 2 * r, self.svd_niter
        )
        rows, columns = (index.to(U.device) for index in self._triplet_indices(r))
        # Indexing by tensors copies, so that the rest of the SVD is freed.
        return LayerFactors(Vh[rows].cpu(), U[:, columns].cpu(), S[columns].cpu())

    def _layer_gradient(self, name: str, weight: torch.Tensor, r: int) -> torch.Tensor:
        """Return the gradient of one layer, checked against its weight and rank."""
        if self.gradients is None:
            raise ValueError(
                f"{self} has no gradients (a file holds none, so a loaded layer cannot start "
                "anew): give it lorafast.estimate_gradients(model, batches, loss_fn)"
            )
        if isinstance(self.gradients, Mapping) != bool(name):
            expected = (
                "a dict from layer names to tensors for a model"
                if name
                else "the one tensor of a layer by itself"
            )
            kind = type(self.gradients).__name__
            raise TypeError(f"gradients is a {kind}, and must be {expected}")
        if isinstance(self.gradients, Mapping):
            G = _gradient_by_name(self.gradients, name)
        else:
            G = self.gradients
        _check_gradient(G, name or "the layer", tuple(weight.shape), r)
        return G.detach()

    def _triplet_indices(self, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the indices of A's triplets and of B's, among the first 2r."""
        indices = torch.arange(2 * r, device="cpu")
        if self.direction == "ArBr":
            return indices[1::2], indices[::2]
        if self.direction == "random":
            indices = torch.randperm(2 * r, device="cpu")
            return indices[:r], indices[:r] if self.compat == "peft" else indices[r:]
        first, second = indices[:r], indices[r:]
        return (first, second) if self.direction == "ArB2r" else (second, first)

    def _factor_scales(
        self, weight: torch.Tensor, r: int, scaling: float, S: torch.Tensor
    ) -> tuple[float, float]:
        """Return the factors of A and of B. S [R] are the singular values of B's columns."""
        peft = self.compat == "peft"
        if self.scale == "unit":
            return 1.0, 1.0
        if self.scale == "gd":
            return 1 / scaling, 1 / scaling
        if self.scale == "stable":
            c = weight.shape[0] ** 0.25 / math.sqrt(self.gamma)
        elif peft:
            sigma = svd.truncated_svd(weight, 1, self.svd_niter)[1]
            c = float(sigma[0] / S[0]) if S[0] > 0 else 1.0
        else:
            sigma = svd.truncated_svd(weight, r, self.svd_niter)[1]
            c = float((sigma / scaling).sqrt().mean())
        return (1.0 if peft else c), c

    def _clip(
        self, A: torch.Tensor, B: torch.Tensor, weight: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        limit, largest = float(weight.abs().max()), scaling * float((B @ A).abs().max())
        factor = math.sqrt(limit / largest) if largest > limit else 1.0
        return A * factor, B * factor

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Layers pickled by version 0.1 have the vectors under the name "own".
        self.__dict__.update(
            {"layer_factors" if name == "own" else name: value for name, value in state.items()}
        )


# The class name in layers pickled by version 0.1.
Own = LayerFactors


def _gradient_by_name(gradients: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name in gradients:
        return gradients[name]
    names = [key for key in gradients if isinstance(key, str)]
    similar = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    hint = f"; near it: {', '.join(similar)}" if similar else ""
    raise ValueError(
        f"gradients has none for {name}{hint}: estimate them for the same target_modules"
    )


def _check_gradient(G: torch.Tensor, layer: str, shape: tuple[int, ...], r: int) -> None:
    checks.pair(f"gradient of {layer}", G, "[N, K]")
    if tuple(G.shape) != shape:
        raise ValueError(f"gradient of {layer} {tuple(G.shape)} must be {shape} as the weight")
    if 2 * r > min(shape):
        raise ValueError(
            f"{layer}: r={r} takes 2r={2 * r} triplets of a gradient {shape}, "
            f"which has {min(shape)}"
        )
    if not G.isfinite().all():
        raise ValueError(f"gradient of {layer} {shape} is not finite")
    if not G.any():
        raise ValueError(
            f"gradient of {layer} {shape} is 0 and says nothing of a direction: "
            "exclude_modules can leave it out"
        )
