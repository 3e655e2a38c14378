"""LoRA-FA (arXiv 2308.03303): A is frozen, and B's gradient is corrected for it before AdamW sees it.

    g_B' = argmin ‖s·g_B'·A - G‖_F = (1/s²) g_B (A Aᵀ)⁻¹          g_B = s·G·Aᵀ [N,R], A [R,K]; G = dL/d(W + sBA) [N,K], never formed
A does not move, so neither does (A Aᵀ)⁻¹: R·R numbers per layer, made once. With freeze_A a layer saves M·R for backward, not x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.adamw import adamw

from lorafast.engine.problem import accumulator
from lorafast.optim.factors import Held, groups, held, inverse_square, refuse_middle


class _Inverse(NamedTuple):
    """(A Aᵀ)⁻¹, and what tells the A it was made of from another. No storage gets another's address while the reference lives."""

    storage: StorageWeakRef
    mark: tuple
    value: torch.Tensor


class LoRAFA(torch.optim.AdamW):
    """AdamW on g_B' for lora_B, plain AdamW for all else that trains (DoRA's magnitude, biases, modules_to_save).

    model: adapted with freeze_A=True. ridge: added to the diagonal of A Aᵀ before the pseudo-inverse, as PEFT does. amsgrad,
    maximize, foreach, fused: AdamW's. s is read at every step and may be a tensor. Under DoRA G is the gradient of W + sBA before
    the gain.
    eps: for lora_B as in PEFT's optimizer, added to √v before the bias correction (a first step's is 32 times torch's); for all
    else as in torch's. Weights decay before the step, as in torch's.
    Two groups, by "name": "factors" and "other"; each has settings of its own to change, and add_param_group takes more. p.grad
    stays what backward made of it, and what has none rests.
    Memory: two moments per trained element as AdamW, R·R per layer, and copies of B's gradients while a group steps.
    The inverse is made anew when A moves, when anything that bumps its version writes to it, and when the optimizer's state is
    loaded. It cannot see a write through `A.data` into the same memory: load_state_dict(state_dict()) makes it look again.
    ValueError where lora_A trains, or a core or out_scale stands beside the factors (LaMDA, VeRA).
    """

    paper: ClassVar[str] = "arXiv 2308.03303"
    trains: ClassVar[str] = "B (A frozen), and what else trains"
    keeps: ClassVar[str] = "2 moments per trained element, R·R per layer"

    def __init__(
        self,
        model: nn.Module,
        lr: float | torch.Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        ridge: float = 1e-8,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        if not ridge >= 0:
            raise ValueError(f"ridge={ridge!r} must not be negative")
        # Before torch's, which calls add_param_group.
        self._held, self._ridge, self._inverses = held(model), float(ridge), {}
        settings = {"amsgrad": amsgrad, "maximize": maximize, "foreach": foreach, "fused": fused}
        super().__init__(groups(model, self._held), lr, betas, eps, weight_decay, **settings)
        # A GradScaler unscales for itself: a count would be ahead where the fused kernel finds an inf and goes back.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a lora_B of the model is corrected there too. ValueError, and no group, for what LoRA-FA is not for."""
        super().add_param_group(param_group)
        try:
            for parameter in self.param_groups[-1]["params"]:
                if parameter in self._held:
                    _refuse(self._held[parameter])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after backward. Returns what closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            gathered: list[list] = [
                [] for _ in range(6)
            ]  # parameters, gradients, first and second moments, amsgrad's, counts
            self._init_group(group, *gathered)
            for eps, indices in self._by_eps(group, gathered[0], gathered[5]).items():
                chosen = [[tensors[i] for i in indices] if tensors else [] for tensors in gathered]
                chosen[1] = [self._corrected(p, grad) for p, grad in zip(*chosen[:2], strict=True)]
                (beta1, beta2), names = (
                    group["betas"],
                    ("lr", "weight_decay", "amsgrad", "maximize", "foreach", "fused"),
                )
                adamw(
                    *chosen,
                    eps=eps,
                    beta1=beta1,
                    beta2=beta2,
                    **{name: group[name] for name in names},
                )
        return loss

    def _is_B(self, parameter: nn.Parameter) -> bool:
        return parameter in self._held and self._held[parameter].part == "lora_B"

    def _by_eps(
        self, group: dict[str, Any], parameters: list[nn.Parameter], counts: list[torch.Tensor]
    ) -> dict[float, list[int]]:
        """Which parameters step with which eps: m̂/(√v̂ + ε/√(1 - β₂ᵗ)) is what PEFT's m/(√v + ε) is after the bias correction."""
        ours = [i for i, parameter in enumerate(parameters) if self._is_B(parameter)]
        # One wait for the device, if the counts are there.
        done = (
            torch.stack([counts[i].to(counts[ours[0]].device) for i in ours]).tolist()
            if ours
            else []
        )
        found = dict.fromkeys(range(len(parameters)), group["eps"])
        found |= {
            i: group["eps"] / math.sqrt(1 - group["betas"][1] ** (count + 1))
            for i, count in zip(ours, done, strict=True)
        }
        by_eps: dict[float, list[int]] = {}
        for i, eps in found.items():
            by_eps.setdefault(eps, []).append(i)
        return by_eps

    def _corrected(self, parameter: nn.Parameter, grad: torch.Tensor) -> torch.Tensor:
        if not self._is_B(parameter):
            return grad
        layer = self._held[parameter].layer
        inverse = self._inverse(layer.lora_A)
        return ((grad.to(inverse.dtype) @ inverse) * inverse_square(layer.scaling)).to(grad.dtype)

    def _inverse(self, A: nn.Parameter) -> torch.Tensor:
        storage, mark = (
            StorageWeakRef(A.untyped_storage()),
            (A._version, A.data_ptr(), A.dtype, A.shape, A.stride()),
        )
        found = self._inverses.get(A)
        if found is None or (found.storage, found.mark) != (storage, mark):
            wide = A.detach().to(accumulator(A.dtype))
            gram = wide @ wide.t()
            gram.diagonal().add_(self._ridge)
            found = self._inverses[A] = _Inverse(
                storage, mark, torch.linalg.pinv(gram, hermitian=True)
            )
        return found.value

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_held": self._held, "_ridge": self._ridge}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._inverses = {}
        super().__setstate__(state)


def _refuse(one: Held) -> None:
    refuse_middle(one, "LoRA-FA")
    if one.part == "lora_A":
        raise ValueError(
            f"{one} {tuple(one.layer.lora_A.shape)} trains, and LoRA-FA is for a frozen A: adapt with lorafast.LoRA(freeze_A=True)"
        )
