"""LoRA-GA (arXiv 2407.05000): LoRA whose first step goes where full fine-tuning's would.

    G = dL/dW = U Σ Vᵀ;  A = c·(r rows of Vᵀ),  B = c·(r other columns of U),  W becomes W - s B A: the start is exact
A first step of SGD moves W by -s² c² (G VᵥVᵥᵀ + UᵤUᵤᵀ G) to first order: where A and B hold the first 2r triplets between them, the
best change of rank 2r along -G. An init, asked for as LoRA(init=LoRAGA(gradients)) or DoRA(init=...); A and B train, nothing more
is saved for backward. On disk it is a LoRA of rank 2r for the untouched weight, as PiSSA is. rslora=True is what the authors use.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch

from lorafast.engine import checks
from lorafast.methods import svd
from lorafast.methods.weight_init import WeightInit

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "gd", "unit", "weightS")


class Own(NamedTuple):
    """What a layer needs of its gradient: A [r,K] and B [N,r], orthonormal, and the singular values [r] of B's columns."""

    A: torch.Tensor
    B: torch.Tensor
    S: torch.Tensor


@dataclass(frozen=True)
class LoRAGA(WeightInit):
    """gradients: of lorafast.estimate_gradients, {layer name: G [N,K]}, or G alone for Linear.from_linear.

    direction: which of G's first 2r triplets are A's and B's. "ArB2r" the first r and the next r, "A2rBr" the other way round,
    "ArBr" every second from the second and from the first, "random" two halves drawn from torch's generator when the layer is made.
    scale: c. "stable" N^¼/√gamma, "gd" 1/s, "unit" 1, "weightS" the mean of √(σ/s) over the first r singular values of W.
    svd_niter: None exact up to min(N,K) = 1024, else 16 subspace iterations; 0 always exact.
    compat="peft": what PEFT's lora_ga makes instead: B's columns times their singular values; "stable" scales B alone; "weightS"
    (there "weight_svd") is σ₁(W) over the singular value of B's first column, on B alone; "random" the same triplets for both. For
    a Conv1D PEFT's "stable" takes K for N; this does not.
    norm_clip: A and B shrink alike until max|s B A| is at most max|W|.
    Two of the same settings are equal, whatever their gradients. A layer keeps 2r vectors of its own, on the CPU, and no gradient.
    In a process group every rank must be given the same gradients.
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
    own: Own | None = field(default=None, repr=False, compare=False)

    paper: ClassVar[str] = "arXiv 2407.05000"
    trains: ClassVar[str] = "A, B"
    keeps: ClassVar[str] = "x by reference + M·R"

    def __post_init__(self) -> None:
        if not isinstance(self.gradients, Mapping | torch.Tensor | None):
            raise TypeError(
                f"gradients must be a dict from layer names to tensors, or a tensor, not {self.gradients!r}"
            )
        checks.word("direction", self.direction, DIRECTIONS)
        checks.word("scale", self.scale, SCALES)
        if (
            isinstance(self.gamma, bool)
            or not isinstance(self.gamma, int | float)
            or not 0 < self.gamma < math.inf
        ):
            raise ValueError(f"gamma={self.gamma!r} must be a positive number")
        svd.iterations(self.svd_niter)
        if self.compat is not None:
            checks.word("compat", self.compat, ("peft",))
        if not isinstance(self.norm_clip, bool):
            raise TypeError(f"norm_clip={self.norm_clip!r} must be True or False")
        if self.norm_clip and self.compat:
            raise ValueError(
                "norm_clip=True belongs to the authors' form; PEFT has none: leave compat='peft' out"
            )

    def bind_layer(self, name: str, weight: torch.Tensor, r: int) -> LoRAGA:
        """The start of one layer, its gradient replaced by the 2r vectors it needs. ValueError naming the layer."""
        if self.own is not None:
            return self
        G = self._gradient(name, weight, r)
        U, S, Vh = svd.top(G if weight.is_meta else G.to(weight.device), 2 * r, self.svd_niter)
        a, b = self._shares(r)
        a, b = a.to(U.device), b.to(U.device)
        # Indexed by tensors these are copies: nothing holds on to the rest of the SVD.
        return replace(self, gradients=None, own=Own(Vh[a].cpu(), U[:, b].cpu(), S[b].cpu()))

    def factors(
        self, weight: torch.Tensor, r: int, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.bind_layer("", weight, r).own
        if (own.A.shape, own.B.shape) != ((r, weight.shape[1]), (weight.shape[0], r)):
            found = f"A {tuple(own.A.shape)} and B {tuple(own.B.shape)}"
            raise ValueError(
                f"{self} was made for {found}, not for r={r} and weight {tuple(weight.shape)}: make it anew"
            )
        A, B, S = (tensor.to(weight.device) for tensor in own)
        if self.compat == "peft":
            B = B * S
        a, b = self._sizes(weight, r, scaling, S)
        A, B = A * a, B * b
        return self._clipped(A, B, weight, scaling) if self.norm_clip else (A, B)

    def _gradient(self, name: str, weight: torch.Tensor, r: int) -> torch.Tensor:
        G, where = self.gradients, name or "the layer"
        if G is None:
            raise ValueError(
                f"{self} has no gradients (a file holds none, so a loaded layer cannot start anew): give it "
                "lorafast.estimate_gradients(model, batches, loss_fn)"
            )
        if isinstance(G, Mapping) != bool(name):
            wanted = (
                "a dict from layer names to tensors for a model"
                if name
                else "the one tensor of a layer by itself"
            )
            raise TypeError(f"gradients is a {type(G).__name__}, and must be {wanted}")
        if name:
            if name not in G:
                close = difflib.get_close_matches(
                    name, [key for key in G if isinstance(key, str)], n=5, cutoff=0.4
                )
                near = f"; near it: {', '.join(close)}" if close else ""
                raise ValueError(
                    f"gradients has none for {name}{near}: estimate them for the same target_modules"
                )
            G = G[name]
        checks.pair(f"gradient of {where}", G, "[N, K]")
        shape = tuple(weight.shape)
        if tuple(G.shape) != shape:
            raise ValueError(f"gradient of {where} {tuple(G.shape)} must be {shape} as the weight")
        if 2 * r > min(shape):
            raise ValueError(
                f"{where}: r={r} takes 2r={2 * r} triplets of a gradient {shape}, which has {min(shape)}"
            )
        if not G.isfinite().all():
            raise ValueError(f"gradient of {where} {shape} is not finite")
        if not G.any():
            raise ValueError(
                f"gradient of {where} {shape} is 0 and says nothing of a direction: exclude_modules can leave it out"
            )
        return G.detach()

    def _shares(self, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The indices of A's triplets and of B's, among the first 2r."""
        both = torch.arange(2 * r, device="cpu")
        if self.direction == "ArBr":
            return both[1::2], both[::2]
        if self.direction == "random":
            both = torch.randperm(2 * r, device="cpu")
            return both[:r], both[:r] if self.compat == "peft" else both[r:]
        return (both[:r], both[r:]) if self.direction == "ArB2r" else (both[r:], both[:r])

    def _sizes(
        self, weight: torch.Tensor, r: int, scaling: float, S: torch.Tensor
    ) -> tuple[float, float]:
        """What A and B are multiplied by. S: the singular values of B's columns."""
        theirs = self.compat == "peft"
        if self.scale == "unit":
            return 1.0, 1.0
        if self.scale == "gd":
            return 1 / scaling, 1 / scaling
        if self.scale == "stable":
            c = weight.shape[0] ** 0.25 / math.sqrt(self.gamma)
        elif theirs:
            c = float(svd.top(weight, 1, self.svd_niter)[1][0] / S[0]) if S[0] > 0 else 1.0
        else:
            c = float((svd.top(weight, r, self.svd_niter)[1] / scaling).sqrt().mean())
        return (1.0 if theirs else c), c

    def _clipped(
        self, A: torch.Tensor, B: torch.Tensor, weight: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        most, taken = float(weight.abs().max()), scaling * float((B @ A).abs().max())
        root = math.sqrt(most / taken) if taken > most else 1.0
        return A * root, B * root
