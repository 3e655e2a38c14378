"""LoRA-FA, low-rank adaptation with a frozen A (arXiv:2308.03303): the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.adamw import adamw

from lorafast.engine.precision import accumulator
from lorafast.optim.factors import (
    AdapterParameter,
    check_two_factors,
    find_adapter_parameters,
    inverse_squared_scaling,
    parameter_groups,
)
from lorafast.runtime.torch_internals import version_of


class _CachedInverse(NamedTuple):
    """(A Aᵀ)⁻¹, with the storage and the version of the A that it was computed from.

    While the weak reference lives, no other storage gets the same address.
    """

    storage: StorageWeakRef
    version: tuple[Any, ...]
    value: torch.Tensor


class LoRAFA(torch.optim.AdamW):
    """LoRA-FA: AdamW with the gradient of lora_B corrected for a frozen lora_A.

        g_B' = argmin ‖s·g_B'·A - G‖_F = (1/s²) g_B (A Aᵀ)⁻¹

    g_B = s G Aᵀ [N, R] is the gradient of lora_B; G [N, K] = dL/d(W + sBA) is never formed. The
    inverse [R, R] is computed once per layer. lora_B trains by AdamW on g_B', everything else that
    trains (DoRA's magnitude, biases, modules_to_save) by AdamW on its own gradient. s is read at
    every step and may be a tensor. Under DoRA, G is the gradient of W + sBA before the gain.

    The parameters are in two groups, by "name": "factors" and "other". p.grad is not changed, and a
    parameter without a gradient does not move. The state holds AdamW's two moments per trained
    element; beside it there are R·R elements per layer, and copies of B's gradients while a group
    steps.

    The inverse is computed again when A moves, when an operation that increments its version writes
    to it, and when the state is loaded. A write through `A.data` into the same memory is not seen:
    call load_state_dict(state_dict()) after one.

    Args:
        model: a model adapted with freeze_A=True.
        lr: the learning rate, a number or a tensor.
        betas: the coefficients (β₁, β₂) of the moments, each in [0, 1).
        eps: ε. For lora_B it is added to √v before the bias correction, as in PEFT's optimizer; in
            the first step this amounts to 32 times torch's ε. For everything else it is torch's.
        weight_decay: the decoupled weight decay, applied before the step, as in torch.
        ridge: a number of at least 0 that is added to the diagonal of A Aᵀ before the
            pseudo-inverse, as in PEFT.
        amsgrad: as in torch.optim.AdamW.
        maximize: as in torch.optim.AdamW.
        foreach: as in torch.optim.AdamW.
        fused: as in torch.optim.AdamW.

    Raises:
        RuntimeError: the adapters are disabled.
        TypeError: model is no module.
        ValueError: a lora_A trains, a layer has a core or an out_scale (LaMDA, VeRA, AdaLoRA,
            AFLoRA), nothing trains, or an argument is out of range.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        lorafast.adapt(model, lorafast.LoRA(r=4, freeze_A=True))
        optimizer = lorafast.optim.LoRAFA(model, lr=1e-3)
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()

    Source:
        arXiv:2308.03303
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
        # Before torch's constructor, which calls add_param_group.
        self._adapter_parameters = find_adapter_parameters(model)
        self._ridge = float(ridge)
        self._inverses: dict[nn.Parameter, _CachedInverse] = {}
        super().__init__(
            parameter_groups(model, self._adapter_parameters),
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        # A GradScaler then unscales the gradients before step(). Otherwise the fused kernel would
        # skip a step that finds an inf after the step counts, which ε depends on, have been read.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch; the gradient of a lora_B of the model is corrected.

        Args:
            param_group: a parameter group.

        Raises:
            ValueError: a parameter is a lora_A, or its layer has a core or an out_scale. The group
                is not added then.
        """
        super().add_param_group(param_group)
        try:
            for parameter in self.param_groups[-1]["params"]:
                if parameter in self._adapter_parameters:
                    _check_parameter(self._adapter_parameters[parameter])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: a function that evaluates the model and returns the loss.

        Returns:
            The result of the closure, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        # The parameters, gradients, first and second moments, AMSGrad's maxima, and step counts.
        lists: list[list[Any]] = [[] for _ in range(6)]
        self._init_group(group, *lists)
        parameters, steps = lists[0], lists[5]
        names = ("lr", "weight_decay", "amsgrad", "maximize", "foreach", "fused")
        settings = {name: group[name] for name in names}
        beta1, beta2 = group["betas"]
        for eps, indices in self._indices_by_eps(group, parameters, steps).items():
            # A list that AMSGrad does not use is empty.
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, counts = (
                [values[i] for i in indices] if values else [] for values in lists
            )
            grads = [self._corrected(p, grad) for p, grad in zip(params, grads, strict=True)]
            adamw(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                max_exp_avg_sqs,
                counts,
                eps=eps,
                beta1=beta1,
                beta2=beta2,
                **settings,
            )

    def _is_B(self, parameter: nn.Parameter) -> bool:
        origin = self._adapter_parameters.get(parameter)
        return origin is not None and origin.tensor_name == "lora_B"

    def _indices_by_eps(
        self, group: dict[str, Any], parameters: list[nn.Parameter], steps: list[torch.Tensor]
    ) -> dict[float, list[int]]:
        """Return the indices of the parameters by the ε to pass to torch's AdamW.

        torch's m̂/(√v̂ + ε/√(1 - β₂ᵗ)) equals PEFT's m/(√v + ε) after the bias correction.
        """
        indices_B = [i for i, parameter in enumerate(parameters) if self._is_B(parameter)]
        eps: dict[int, float] = {i: group["eps"] for i in range(len(parameters))}
        if indices_B:
            # Stacked, for one transfer if the counts are on a device.
            device = steps[indices_B[0]].device
            counts = torch.stack([steps[i].to(device) for i in indices_B]).tolist()
            for i, count in zip(indices_B, counts, strict=True):
                eps[i] = group["eps"] / math.sqrt(1 - group["betas"][1] ** (count + 1))
        by_eps: dict[float, list[int]] = {}
        for i, value in eps.items():
            by_eps.setdefault(value, []).append(i)
        return by_eps

    def _corrected(self, parameter: nn.Parameter, grad: torch.Tensor) -> torch.Tensor:
        """Return g_B' for a lora_B in the gradient's dtype, and the gradient for the rest."""
        if not self._is_B(parameter):
            return grad
        layer = self._adapter_parameters[parameter].layer
        inverse = self._inverse(layer.lora_A)
        factor = inverse_squared_scaling(layer.scaling)
        return ((grad.to(inverse.dtype) @ inverse) * factor).to(grad.dtype)

    def _inverse(self, A: nn.Parameter) -> torch.Tensor:
        storage = StorageWeakRef(A.untyped_storage())
        version = (version_of(A), A.data_ptr(), A.dtype, A.shape, A.stride())
        cached = self._inverses.get(A)
        if cached is None or (cached.storage, cached.version) != (storage, version):
            wide = A.detach().to(accumulator(A.dtype))
            gram = wide @ wide.mT
            gram.diagonal(dim1=-2, dim2=-1).add_(self._ridge)
            cached = _CachedInverse(storage, version, torch.linalg.pinv(gram, hermitian=True))
            self._inverses[A] = cached
        return cached.value

    def __getstate__(self) -> dict[str, Any]:
        state = {"_adapter_parameters": self._adapter_parameters, "_ridge": self._ridge}
        return super().__getstate__() | state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._inverses = {}
        super().__setstate__(state)


def _check_parameter(origin: AdapterParameter) -> None:
    check_two_factors(origin, "LoRA-FA")
    A, B = origin.layer.lora_A, origin.layer.lora_B
    if A.dim() > B.dim():
        raise ValueError(
            f"{origin.layer_name or 'the layer'}: lora_B {tuple(B.shape)} is of all experts, and "
            f"lora_A {tuple(A.shape)} of each: LoRA-FA has no closed form for that"
        )
    if origin.tensor_name == "lora_A":
        raise ValueError(
            f"{origin} {tuple(origin.layer.lora_A.shape)} trains, and LoRA-FA is for a frozen A: "
            "adapt with lorafast.LoRA(freeze_A=True)"
        )
