"""LoRA as an optimizer: the factors of LoRA (arXiv:2106.09685) in the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lorafast.engine.row_blocks import row_blocks
from lorafast.methods.lora import LoRA
from lorafast.methods.weight_init import WeightInit
from lorafast.models.adapt import temporary_seed
from lorafast.models.adapt_spec import ALL_LINEAR, ModuleSelector
from lorafast.models.module_names import unwrap
from lorafast.nn.adapter_layer import factor_dtype
from lorafast.optim import weights


class LoRAAsOptimizer(Optimizer):
    """LoRA as an optimizer: any torch optimizer on LoRA factors, whose product updates the weights.

        dA = s BᵀG,  dB = s G Aᵀ,  (A', B') = step(A, B, dA, dB),  W ← W + s (B'A' - BA)

    G [N, K] = dL/dW; the factors A [R, K] and B [N, R] are in the optimizer's state. The model has
    no adapter layers and its checkpoint is plain weights. Its weights follow those of LoRA layers
    on W₀ with W = W₀ + sBA: with the same initial factors, optimizer and settings the two differ by
    rounding alone. With freeze_A under SGD this is projected gradient descent, W ← W - η s² G AᵀA.
    The cost is G, which a LoRA layer never computes: all weight gradients of the model at once, or
    one at a time with per_layer=True. Create the optimizer after model.to(device).

    The state holds (N + K)·R elements of factors per weight, what optimizer_class keeps for them,
    and N·K elements more per bf16 or fp16 weight with compensate=True.

    Args:
        model: a model without adapters. The weights of targeted linears train; everything else is
            frozen, unless train_rest is True.
        optimizer_class: a class of torch.optim, which updates the factors.
        lr: the learning rate of the factors.
        r: rank R, at least 1.
        alpha: numerator of the scaling s = alpha/r, or alpha/√r with rslora.
        rslora: True for s = alpha/√r.
        init: the initial factors: "kaiming", "gaussian", or `PiSSA()`, which here leaves the weight
            unchanged.
        freeze_A: True if A does not train.
        target_modules: the linears to train, selected as by `lorafast.adapt`.
        exclude_modules: linears to leave out, selected in the same way.
        train_rest: True if all other parameters that require grad train by optimizer_class
            directly.
        per_layer: True to compute dA and dB inside backward and to free each G at once. Gradients
            still accumulate over several backwards, and `factors` can be clipped before step(). Not
            with a GradScaler or DistributedDataParallel.
        compensate: True to keep the rounding error of each update of a bf16 or fp16 weight and to
            add it to the next one, because most updates are smaller than the weight's rounding. W
            then follows W₀ + sBA to within one rounding. It has no effect on fp32 and fp64 weights.
        seed: seed of the initial factors; None draws from torch's generator. Required in a process
            group, so that all ranks start from the same factors.
        **settings: further arguments of optimizer_class.

    Raises:
        NotImplementedError: a weight is sharded.
        TypeError: optimizer_class is no optimizer class, or a target is no linear.
        ValueError: an argument is out of range, a target has an adapter, seed is None in a process
            group, or the model is in DistributedDataParallel with per_layer=True. The model has not
            changed then.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 16))
        optimizer = lorafast.optim.LoRAAsOptimizer(model, torch.optim.AdamW, lr=1e-3, r=4)
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()

    Source:
        arXiv:2106.09685, for the path of the weights
    """

    paper: ClassVar[str] = "arXiv 2106.09685"
    trains: ClassVar[str] = "the targeted weights, along LoRA's path"
    keeps: ClassVar[str] = "what full training of the targeted weights keeps; states as LoRA's"

    def __init__(
        self,
        model: nn.Module,
        optimizer_class: type[Optimizer],
        lr: float,
        r: int = 8,
        alpha: float = 8,
        *,
        rslora: bool = False,
        init: str | WeightInit = "kaiming",
        freeze_A: bool = False,
        target_modules: ModuleSelector = ALL_LINEAR,
        exclude_modules: ModuleSelector | None = None,
        train_rest: bool = False,
        per_layer: bool = False,
        compensate: bool = True,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
            raise TypeError(
                "optimizer_class must be a class of torch.optim such as torch.optim.AdamW, "
                f"not {optimizer_class!r}"
            )
        adapter = LoRA(r=r, alpha=alpha, rslora=rslora, init=init, freeze_A=freeze_A)
        targets = weights.select_weights(model, target_modules, exclude_modules)
        _check_targets(targets, seed)
        if per_layer:
            weights.check_not_ddp(model)
        with temporary_seed(seed, model):
            factored_weights = [_FactoredWeight(target, adapter, compensate) for target in targets]
        self._factored_weights = factored_weights
        self._scaling, self._per_layer = adapter.scaling, per_layer
        trained = [factored.weight for factored in factored_weights]
        others = _other_parameters(model, trained) if train_rest else []
        self._init_groups(optimizer_class, trained, others, {"lr": lr} | settings)
        kept = {*trained, *others}
        for parameter in unwrap(model).parameters():
            parameter.requires_grad_(parameter in kept)
        # After that, because a hook needs a tensor that requires grad.
        self._register_hooks()

    def _init_groups(
        self,
        optimizer_class: Callable[..., Optimizer],
        trained: list[nn.Parameter],
        others: list[nn.Parameter],
        settings: dict[str, Any],
    ) -> None:
        """Create the optimizer of the factors, and this one's groups with the same settings."""
        inner_groups: list[dict[str, Any]] = [{"params": self.factors}]
        outer_parameters = [trained]
        if others:
            inner_groups.append({"params": others})
            outer_parameters.append(others)
        self._factor_optimizer = optimizer_class(inner_groups, **settings)
        groups = [
            {**group, "params": parameters}
            for group, parameters in zip(
                self._factor_optimizer.param_groups, outer_parameters, strict=True
            )
        ]
        super().__init__(groups, self._factor_optimizer.defaults)

    @property
    def factors(self) -> list[nn.Parameter]:
        """Every A that trains and every B: the parameters to clip with per_layer=True."""
        return [
            factor
            for factored in self._factored_weights
            for factor in (factored.A, factored.B)
            if factor.requires_grad
        ]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse further groups: the constructor determines what trains.

        Args:
            param_group: a parameter group.

        Raises:
            NotImplementedError: always, once the optimizer exists.
        """
        if hasattr(self, "_hooks"):
            raise NotImplementedError(
                "LoRAAsOptimizer takes what else trains by train_rest=True, and no further groups"
            )
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the weights, as in torch, and those of the factors.

        Args:
            set_to_none: True to set the gradients of the weights to None instead of 0.
        """
        super().zero_grad(set_to_none)
        self._clear_factor_gradients()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update the factors by optimizer_class, and every weight by the change of its product.

        Args:
            closure: a function that evaluates the model and returns the loss.

        Returns:
            The loss of the closure, None without factored.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._per_layer:
            self._clear_factor_gradients()
            for factored in self._factored_weights:
                if factored.weight.grad is not None:
                    factored.accumulate_gradients(self._scaling)
        before = [
            (factored, factored.A.clone(), factored.B.clone())
            for factored in self._factored_weights
            if factored.B.grad is not None
        ]
        _copy_settings(self.param_groups, self._factor_optimizer.param_groups)
        self._factor_optimizer.step()
        # Some optimizers count their steps in the groups.
        _copy_settings(self._factor_optimizer.param_groups, self.param_groups)
        for factored, A, B in before:
            factored.update_weight(A, B, self._scaling)
        if not self._per_layer:
            self._clear_factor_gradients()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as in torch, with the factors and the state of optimizer_class.

        Returns:
            torch's keys, "factors" (a dict of tensors per weight) and "inner" (the state dict of
            optimizer_class). The weights themselves are in the model's state dict.
        """
        factors = [
            {name: tensor.detach() for name, tensor in factored.state_tensors().items()}
            for factored in self._factored_weights
        ]
        inner = self._factor_optimizer.state_dict()
        return super().state_dict() | {"factors": factors, "inner": inner}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state, on a model that has the weights of the same moment.

        Args:
            state_dict: a result of `state_dict`.

        Raises:
            ValueError: the state is of another optimizer, of other layers or of other ranks.
        """
        if not {"factors", "inner"} <= state_dict.keys():
            raise ValueError(
                f"state {sorted(state_dict)} lacks factors and inner: it is of another optimizer"
            )
        saved = state_dict["factors"]
        self._check_shapes(saved)
        super().load_state_dict(
            {name: value for name, value in state_dict.items() if name not in ("factors", "inner")}
        )
        self._factor_optimizer.load_state_dict(state_dict["inner"])
        for factored, tensors in zip(self._factored_weights, saved, strict=True):
            for name, tensor in factored.state_tensors().items():
                tensor.copy_(tensors[name])

    def _check_shapes(self, saved: list[dict[str, torch.Tensor]]) -> None:
        if len(saved) != len(self._factored_weights):
            raise ValueError(
                f"state has factors of {len(saved)} weights, "
                f"this optimizer {len(self._factored_weights)}"
            )
        for factored, tensors in zip(self._factored_weights, saved, strict=True):
            shapes, expected = _shapes(tensors), _shapes(factored.state_tensors())
            if shapes != expected:
                raise ValueError(
                    f"state has {shapes} for {factored.target.name}, this optimizer {expected}"
                )

    def __getstate__(self) -> dict[str, Any]:
        own = ("_factored_weights", "_scaling", "_per_layer", "_factor_optimizer")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy's Parameters have no hooks. load_state_dict comes here too, without that key.
        if "_per_layer" in state:
            self._register_hooks()

    def _register_hooks(self) -> None:
        self._hooks = [
            weights.register_gradient_hook(
                self, factored.weight, LoRAAsOptimizer._accumulate, factored
            )
            for factored in self._factored_weights
            if self._per_layer
        ]

    def _accumulate(self, parameter: nn.Parameter, factored: _FactoredWeight) -> None:
        factored.accumulate_gradients(self._scaling)

    def _clear_factor_gradients(self) -> None:
        for factor in self.factors:
            factor.grad = None


class _FactoredWeight:
    """One weight, its factors A and B, and the rounding error of its updates."""

    def __init__(self, target: weights.TargetWeight, adapter: LoRA, compensate: bool) -> None:
        self.target, self.weight = target, target.weight
        W = target.as_matrix(target.weight.detach())
        dtype = factor_dtype(W.dtype, None)
        factors = {name: tensor.to(dtype) for name, tensor in adapter.init_tensors(W).items()}
        self.A = nn.Parameter(factors["lora_A"].clone(), requires_grad=not adapter.freeze_A)
        self.B = nn.Parameter(factors["lora_B"].clone())
        is_half = W.dtype.itemsize == 2
        self.rounding_error = torch.zeros_like(W) if compensate and is_half else None

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that a state dict holds, by their names there."""
        tensors: dict[str, torch.Tensor] = {"lora_A": self.A, "lora_B": self.B}
        if self.rounding_error is not None:
            tensors["lost"] = self.rounding_error
        return tensors

    def accumulate_gradients(self, s: float) -> None:
        """Add s BᵀG and s G Aᵀ to the gradients of the factors."""
        assert self.weight.grad is not None
        G = self.target.as_matrix(self.weight.grad)
        if G.is_sparse:
            raise ValueError(
                f"the gradient of {self.target.name} {tuple(G.shape)} is sparse; "
                "this optimizer needs dense ones"
            )
        dA, dB = torch.zeros_like(self.A), torch.empty_like(self.B)
        # A gradient of another dtype is cast block by block, without a second one of full size.
        for rows in [slice(None)] if G.dtype == self.A.dtype else row_blocks(G):
            wide = G[rows].to(self.A.dtype)
            torch.mm(wide, self.A.t(), out=dB[rows])
            if self.A.requires_grad:
                dA.addmm_(self.B[rows].t(), wide)
        for factor, gradient in ((self.A, dA), (self.B, dB)):
            if factor.requires_grad:
                gradient *= s
                factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)

    def update_weight(self, A: torch.Tensor, B: torch.Tensor, s: float) -> None:
        """Compute W ← W + s (B'A' - BA), where A and B are the factors before the step."""
        # As (B' - B) A' + B (A' - A), so that no large terms cancel.
        left, right = torch.cat([self.B - B, B], 1), torch.cat([self.A, self.A - A])
        W = self.target.as_matrix(self.weight)
        if W.dtype == left.dtype:
            W.addmm_(left, right, alpha=s)
            return
        for rows in row_blocks(W):
            wide = W[rows].to(left.dtype).addmm_(left[rows], right, alpha=s)
            if self.rounding_error is not None:
                wide += self.rounding_error[rows]
            W[rows] = wide
            if self.rounding_error is not None:
                self.rounding_error[rows] = wide - W[rows]


def _check_targets(targets: list[weights.TargetWeight], seed: int | None) -> None:
    for target in targets:
        if target.has_adapter:
            raise ValueError(
                f"{target.name} has an adapter already: LoRAAsOptimizer trains plain weights"
            )
    if seed is None and dist.is_available() and dist.is_initialized():
        raise ValueError(
            "seed=None: in a process group every rank must draw the same factors; "
            "give all the same seed"
        )


def _other_parameters(model: nn.Module, trained: list[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters that require grad and are not among the targeted weights."""
    targeted = set(trained)
    return [p for p in unwrap(model).parameters() if p.requires_grad and p not in targeted]


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _copy_settings(source: list[dict[str, Any]], target: list[dict[str, Any]]) -> None:
    for from_group, to_group in zip(source, target, strict=True):
        to_group.update((name, value) for name, value in from_group.items() if name != "params")
