"""DoRA, weight-decomposed low-rank adaptation (arXiv:2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from lorafast import functional
from lorafast.engine import checks
from lorafast.methods.adapter import TensorSpec
from lorafast.methods.lora import LoRA


@dataclass(frozen=True, repr=False)
class DoRA(LoRA):
    """DoRA: LoRA for the direction of the weight, and a trained magnitude for its length.

        y = gain ⊙ (x Wᵀ + s (drop(x) Aᵀ) Bᵀ) + bias        gain = m / ‖W + sBA‖ per output row

    A [R, K], B [N, R] and the magnitude m [N] train. m starts at ‖W + sBA‖, so that the output is
    unchanged at the start. Saved for backward: x by reference, M·R elements of drop(x) Aᵀ, the
    norm, and what `keep` says for the gradient of the magnitude, d_m = Σ dy⊙z / norm, where z is
    the output before gain and bias.

    With `magnitude_only` (section 5.6 of the paper) m alone trains, with gain = m / ‖W‖. The layer
    then holds an A and a B of rank 1 that are 0 and do not train, and saves what `keep` says;
    keep="recompute" also saves x and h, and axis="in" also saves x.

    Args:
        r: rank R, at least 1; always 1 with magnitude_only.
        alpha: numerator of the scaling s, a finite number; always 1 with magnitude_only.
        dropout: probability in [0, 1) that an element of the adapter's input is dropped.
        rslora: True for s = alpha/√r instead of alpha/r.
        init: "kaiming", "gaussian", `PiSSA()` or `LoRAGA(gradients)`, as in `LoRA`.
        freeze_A: True if A does not train.
        lora_bias: True for a trained bias [N] of B.
        axis: "out" for a magnitude per output row, as the authors and PEFT have it; "in" for a
            magnitude [K] per input column, where the gain multiplies x.
        dropout_on: "adapter" drops elements of the adapter's input alone; "both" drops them in the
            correction of the base term too, as PEFT and the authors do, at the price of a second
            base product in forward and in backward.
        keep: what is saved for d_m. "output": y, by reference. "inner": z [M, N], rounded once.
            "recompute": nothing, and backward computes z with one more base product. "auto":
            "output" without a bias in bf16 and fp32, else "inner". Where m is 0, "output" gives
            d_m = 0 and the others the true d_m.
        detach_norm: True if no gradient flows through the norm, as in the paper; False for the
            exact gradient.
        cache_norm: True to keep the norm between the steps of an optimizer, for gradient
            accumulation or evaluation. The caller vouches that nothing else writes the weight or a
            factor past torch's version counters: not `.data`, a storage, dlpack,
            torch.distributed or an optimizer that is no torch.optim.Optimizer. `train()` drops
            what is kept. False computes the norm in every forward.
        magnitude_only: True if the magnitude alone trains.

    Raises:
        TypeError: an argument has PEFT's name for it, or a flag is not a bool.
        ValueError: a field is out of range, fields exclude each other, or a field of the factors is
            not at its default with magnitude_only.

    Example:
        import torch, lorafast

        layer = lorafast.Linear(64, 32, bias=False, adapter=lorafast.DoRA(r=8, alpha=16))
        layer(torch.randn(4, 64)).sum().backward()

    Source:
        arXiv:2402.09353
    """

    axis: str = "out"
    dropout_on: str = "adapter"
    keep: str = "auto"
    detach_norm: bool = True
    cache_norm: bool = False
    magnitude_only: bool = False

    paper: ClassVar[str] = "arXiv 2402.09353"
    trains: ClassVar[str] = "A, B, magnitude"
    keeps: ClassVar[str] = "x by reference + M·R + y by reference, z or nothing (keep)"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.words(self.axis, self.dropout_on, self.keep, self.dropout)
        if self.magnitude_only:
            self._check_factor_fields()
            for name in ("r", "alpha"):
                object.__setattr__(self, name, 1)

    def without_factors(self) -> DoRA:
        """Return this adapter with magnitude_only=True and the factors' fields reset."""
        return replace(self, magnitude_only=True, **self._factor_defaults())

    def _check_factor_fields(self) -> None:
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name, default in self._factor_defaults().items()
            if getattr(self, name) != default
        ]
        if changed:
            raise ValueError(f"magnitude_only=True: there are no factors for {', '.join(changed)}")

    def _factor_defaults(self) -> dict[str, Any]:
        """Return the defaults of the fields that concern A and B alone."""
        defaults = {"init": "kaiming", "freeze_A": False, "lora_bias": False, "rslora": False}
        if self.dropout_on == "adapter":
            defaults["dropout"] = 0.0
        return defaults

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        specs = super().tensor_specs(N, K)
        if self.magnitude_only:
            specs = {name: spec._replace(trained=False) for name, spec in specs.items()}
        return specs | {"lora_magnitude": TensorSpec((N if self.axis == "out" else K,))}

    def init_tensors(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.magnitude_only:
            specs = super().tensor_specs(*weight.shape)
            tensors = {
                name: torch.zeros(spec.shape, device=weight.device) for name, spec in specs.items()
            }
        else:
            tensors = super().init_tensors(weight)
        # With a residual init, W is here still the weight from which sBA will be subtracted:
        # afterwards its W + sBA is this W.
        B = torch.zeros_like(tensors["lora_B"]) if self.residual else tensors["lora_B"]
        norm = functional.row_norm(
            weight, tensors["lora_A"], B, scaling=self.scaling, axis=self.axis
        )
        return tensors | {"lora_magnitude": norm}
