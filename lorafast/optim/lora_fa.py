"""LoRA-FA (arXiv 2308.03303): A is frozen, and B's gradient is corrected for it before AdamW sees it.

    g_B' = argmin ‖s·g_B'·A - G‖_F = (1/s²) g_B (A Aᵀ)⁻¹          g_B = s·G·Aᵀ [N,R], A [R,K]; G = dL/d(W + sBA) [N,K], never formed
A does not move, so neither does (A Aᵀ)⁻¹: R·R numbers per layer, made once. With freeze_A a layer saves M·R for backward, not x.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lorafast.optim.factors import Held, groups, held, inverse_square, refuse_middle
from lorafast.problem import accumulator


class _Inverse(NamedTuple):
    """(A Aᵀ)⁻¹, and what tells the A it was made of from another. No storage gets another's address while the reference lives."""

    storage: StorageWeakRef
    mark: tuple
    value: torch.Tensor


class LoRAFA(torch.optim.AdamW):
    """AdamW on g_B' for lora_B, plain AdamW for all else that trains (DoRA's magnitude, biases, modules_to_save).

    model: adapted with freeze_A=True. ridge: added to the diagonal of A Aᵀ before the pseudo-inverse, as PEFT does. settings:
    amsgrad, maximize, foreach, fused, capturable and differentiable of AdamW. s is read at every step and may be a tensor. Under
    DoRA G is the gradient of W + sBA before the gain. Two groups, by "name": "factors" and "other"; each has an lr of its own to
    set, and add_param_group takes more. p.grad stays what backward made of it. Two habits are torch's and not PEFT's: eps is added
    to √v̂ (there to √v, before the bias correction), and weights decay before the step (there after it).
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
        **settings: Any,
    ) -> None:
        if not ridge >= 0:
            raise ValueError(f"ridge={ridge!r} must not be negative")
        # Before torch's, which calls add_param_group.
        self._held, self._ridge, self._inverses = held(model), float(ridge), {}
        super().__init__(groups(model, self._held), lr, betas, eps, weight_decay, **settings)

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

    def _init_group(self, group, params_with_grad, grads, *states):
        # Where torch gathers a group's gradients for any of its forms (looped, foreach, fused).
        has_complex = super()._init_group(group, params_with_grad, grads, *states)
        for i, parameter in enumerate(params_with_grad):
            one = self._held.get(parameter)
            if one is not None and one.part == "lora_B":
                grads[i] = self._corrected(grads[i], one)
        return has_complex

    def _corrected(self, grad: torch.Tensor, one: Held) -> torch.Tensor:
        inverse = self._inverse(one.layer.lora_A)
        return ((grad.to(inverse.dtype) @ inverse) * inverse_square(one.layer.scaling)).to(grad.dtype)

    def _inverse(self, A: nn.Parameter) -> torch.Tensor:
        storage, mark = StorageWeakRef(A.untyped_storage()), (A._version, A.data_ptr(), A.dtype, A.shape, A.stride())
        found = self._inverses.get(A)
        if found is None or (found.storage, found.mark) != (storage, mark):
            wide = A.detach().to(accumulator(A.dtype))
            gram = wide @ wide.t()
            gram.diagonal().add_(self._ridge)
            found = self._inverses[A] = _Inverse(storage, mark, torch.linalg.pinv(gram, hermitian=True))
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
