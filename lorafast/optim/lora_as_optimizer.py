"""LoRA as an optimizer: the factors of LoRA (arXiv 2106.09685) live in the optimizer's state, and what it writes is W itself.

    dA = s BᵀG,  dB = s G Aᵀ,  (A', B') = step(A, B, dA, dB),  W ← W + s(B'A' - BA)          G [N,K] = dL/dW, A [R,K], B [N,R]
The model runs without any adapter, and goes exactly where LoRA layers on W₀ with W = W₀ + sBA would take it; with the same start,
optimizer and settings the two differ by rounding alone. A checkpoint of the model is plain weights. With freeze_A under SGD this
is the projected gradient descent W ← W - ηs² G AᵀA. The price is G, which a LoRA layer never makes: all weight gradients of a
model at once, or with per_layer=True one at a time.
"""

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
from lorafast.models.adapt import seeded
from lorafast.models.adapt_spec import ALL_LINEAR, Names
from lorafast.models.module_names import unwrapped
from lorafast.nn.adapter_layer import factor_dtype
from lorafast.optim import weights


class LoRAAsOptimizer(Optimizer):
    """Trains the weights of targeted linears by optimizer_class on LoRA factors of theirs: a torch Optimizer over the weights.

    r, alpha, rslora, init (a word or PiSSA(), which here leaves W as it is) and freeze_A are lorafast.LoRA's, target_modules and
    exclude_modules lorafast.adapt's; **settings go to optimizer_class. Everything else is frozen, or with train_rest=True what
    requires grad trains as under optimizer_class alone. factors: fp32 beside a bf16 or fp16 weight, else the weight's dtype.
    W takes each increment with one rounding. In bf16 and fp16 most increments are smaller than that, so compensate=True keeps what
    a rounding lost, in the weight's dtype, and adds it the next time: N·K numbers more, and W follows W₀ + sBA to within a
    rounding of W, however many steps. In fp32 and fp64 roundings add up like a random walk of half ulps; nothing is kept there.
    State: (N+K)·R of factors and what optimizer_class keeps for them. per_layer=True makes dA and dB of each G as soon as backward
    has it, and frees it: batches still add up, and `factors` can be clipped before step() as in LoRA; no GradScaler, and no DDP.
    seed: a generator of its own for A; in a process group there must be one, or ranks would start apart. Make it after model.to().
    ValueError, TypeError: bad numbers, a target that is adapted already or no linear; nothing has changed then.
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
        target_modules: Names = ALL_LINEAR,
        exclude_modules: Names | None = None,
        train_rest: bool = False,
        per_layer: bool = False,
        compensate: bool = True,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
            raise TypeError(
                f"optimizer_class must be a class of torch.optim such as torch.optim.AdamW, not {optimizer_class!r}"
            )
        adapter = LoRA(r=r, alpha=alpha, rslora=rslora, init=init, freeze_A=freeze_A)
        targets = weights.chosen(model, target_modules, exclude_modules)
        if adapted := [one.name for one in targets if one.adapted]:
            raise ValueError(
                f"{adapted[0]} has an adapter already: LoRAAsOptimizer trains plain weights"
            )
        if seed is None and dist.is_available() and dist.is_initialized():
            raise ValueError(
                "seed=None: in a process group every rank must draw the same factors; give all the same seed"
            )
        if per_layer:
            weights.refuse_parallel(model)
        with seeded(seed, model):
            held = [_Held(one, adapter, compensate) for one in targets]
        own = {one.weight for one in held}
        rest = (
            [p for p in unwrapped(model).parameters() if p.requires_grad and p not in own]
            if train_rest
            else []
        )
        self._held, self._scaling, self._per_layer = held, adapter.scaling, per_layer
        moved = [{"params": self.factors}] + ([{"params": rest}] if rest else [])
        self._inner = optimizer_class(moved, lr=lr, **settings)
        mine = [[one.weight for one in held]] + ([rest] if rest else [])
        groups = [
            {**group, "params": params}
            for group, params in zip(self._inner.param_groups, mine, strict=True)
        ]
        super().__init__(groups, self._inner.defaults)
        self._hooks = [
            weights.on_gradient(self, one.weight, LoRAAsOptimizer._fold_one, one)
            for one in held
            if per_layer
        ]
        for parameter in unwrapped(model).parameters():
            parameter.requires_grad_(parameter in own or (train_rest and parameter.requires_grad))

    @property
    def factors(self) -> list[nn.Parameter]:
        """Every A (unless frozen) and B: what optimizer_class moves, and what to clip with per_layer=True."""
        return [factor for one in self._held for factor in (one.A, one.B) if factor.requires_grad]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """NotImplementedError once the optimizer is made: it says itself what trains."""
        if hasattr(self, "_hooks"):
            raise NotImplementedError(
                "LoRAAsOptimizer takes what else trains by train_rest=True, and no further groups"
            )
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, and the gradients of the factors are forgotten."""
        super().zero_grad(set_to_none)
        self._forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of optimizer_class on the factors, and W by what they moved."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._per_layer:
            self._forget()
            for one in self._held:
                if one.weight.grad is not None:
                    one.fold(self._scaling)
        live = [(one, one.A.clone(), one.B.clone()) for one in self._held if one.B.grad is not None]
        _copy_settings(self.param_groups, self._inner.param_groups)
        self._inner.step()
        # Some optimizers count in their groups.
        _copy_settings(self._inner.param_groups, self.param_groups)
        for one, A, B in live:
            one.move(A, B, self._scaling)
        if not self._per_layer:
            self._forget()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the factors, what roundings lost, and optimizer_class's own state. The weights are the model's."""
        factors = [
            {name: tensor.detach() for name, tensor in one.tensors().items()} for one in self._held
        ]
        return super().state_dict() | {"factors": factors, "inner": self._inner.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, on a model with the weights of that moment. ValueError if it is of other layers or ranks."""
        if not {"factors", "inner"} <= state_dict.keys():
            raise ValueError(
                f"state {sorted(state_dict)} lacks factors and inner: it is of another optimizer"
            )
        given = state_dict["factors"]
        if len(given) != len(self._held):
            raise ValueError(
                f"state has factors of {len(given)} weights, this optimizer {len(self._held)}"
            )
        for one, tensors in zip(self._held, given, strict=True):
            now = {name: tuple(tensor.shape) for name, tensor in one.tensors().items()}
            if (then := {name: tuple(tensor.shape) for name, tensor in tensors.items()}) != now:
                raise ValueError(f"state has {then} for {one.target.name}, this optimizer {now}")
        super().load_state_dict(
            {name: value for name, value in state_dict.items() if name not in ("factors", "inner")}
        )
        self._inner.load_state_dict(state_dict["inner"])
        for one, tensors in zip(self._held, given, strict=True):
            for name, tensor in one.tensors().items():
                tensor.copy_(tensors[name])

    def _fold_one(self, parameter: nn.Parameter, one: _Held) -> None:
        one.fold(self._scaling)

    def _forget(self) -> None:
        for factor in self.factors:
            factor.grad = None


class _Held:
    """One weight, its factors, and what roundings of it have lost."""

    def __init__(self, target: weights.Target, adapter: LoRA, compensate: bool) -> None:
        self.target, self.weight = target, target.weight
        W = target.matrix(target.weight.detach())
        dtype, half = factor_dtype(W, None), W.dtype.itemsize == 2
        start = {name: tensor.to(dtype) for name, tensor in adapter.init_tensors(W).items()}
        self.A = nn.Parameter(start["lora_A"].clone(), requires_grad=not adapter.freeze_A)
        self.B = nn.Parameter(start["lora_B"].clone())
        self.lost = torch.zeros_like(W) if compensate and half else None

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a state holds of it."""
        return {"lora_A": self.A, "lora_B": self.B} | (
            {} if self.lost is None else {"lost": self.lost}
        )

    def fold(self, s: float) -> None:
        """Add s BᵀG and s G Aᵀ to the factors' gradients."""
        G = self.target.matrix(self.weight.grad)
        if G.is_sparse:
            raise ValueError(
                f"the gradient of {self.target.name} {tuple(G.shape)} is sparse; this optimizer needs dense ones"
            )
        dA, dB = torch.zeros_like(self.A), torch.empty_like(self.B)
        for rows in [slice(None)] if G.dtype == self.A.dtype else row_blocks(G):
            wide = G[rows].to(self.A.dtype)
            torch.mm(wide, self.A.t(), out=dB[rows])
            if self.A.requires_grad:
                dA.addmm_(self.B[rows].t(), wide)
        for factor, gradient in ((self.A, dA), (self.B, dB)):
            if factor.requires_grad:
                gradient *= s
                factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)

    def move(self, A: torch.Tensor, B: torch.Tensor, s: float) -> None:
        """W ← W + s(B'A' - BA), from the factors as they were."""
        # As (B'-B)A' + B(A'-A) nothing large cancels.
        left, right = torch.cat([self.B - B, B], 1), torch.cat([self.A, self.A - A])
        W = self.target.matrix(self.weight)
        if W.dtype == left.dtype:
            W.addmm_(left, right, alpha=s)
            return
        for rows in row_blocks(W):
            wide = W[rows].to(left.dtype).addmm_(left[rows], right, alpha=s)
            if self.lost is not None:
                wide += self.lost[rows]
            W[rows] = wide
            if self.lost is not None:
                self.lost[rows] = wide - W[rows]


def _copy_settings(source: list[dict[str, Any]], to: list[dict[str, Any]]) -> None:
    for one, other in zip(source, to, strict=True):
        other.update((name, value) for name, value in one.items() if name != "params")
