"""Problems of one layer: the parts of the formula, sizes, dtypes, and their tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

SHORT = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


GRADIENTS = ("x", "bias", "lora_A", "lora_B", "core", "magnitude", "out_scale", "lora_bias")


@dataclass(frozen=True)
class Form:
    """The parts of the formula that a method uses."""

    name: str
    core: str = "none"
    magnitude: bool = False
    axis: str = "out"
    dropout_on: str = "adapter"
    keep: str = "auto"
    out_scale: bool = False
    lora_bias: bool = False
    detach_norm: bool = True


FORMS = (
    Form("lora"),
    Form("lora-bias", lora_bias=True),
    Form("lamda", core="full"),
    Form("adalora", core="diagonal"),
    Form("vera", core="diagonal", out_scale=True),
    Form("dora", magnitude=True),
    Form("dora-output", magnitude=True, keep="output"),
    Form("dora-inner", magnitude=True, keep="inner"),
    Form("dora-recompute", magnitude=True, keep="recompute"),
    Form("dora-recompute-bias", magnitude=True, keep="recompute", lora_bias=True),
    Form("dora-both", magnitude=True, dropout_on="both"),
    Form("dora-both-recompute", magnitude=True, dropout_on="both", keep="recompute"),
    Form("dora-exact", magnitude=True, detach_norm=False),
    Form("dora-in", magnitude=True, axis="in"),
    Form("dora-in-both", magnitude=True, axis="in", dropout_on="both"),
    Form("dvora", magnitude=True, core="full", out_scale=True, lora_bias=True),
)


@dataclass(frozen=True)
class Case:
    """One problem; str() is its test id."""

    form: Form
    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    dropout: float = 0.0
    bias: bool = True
    scaling: float = 1.7
    adapter_dtype: torch.dtype | None = None
    transposed: bool = False
    # Of dy: a mean over many tokens makes it small.
    grad_scale: float = 1.0

    def __str__(self) -> str:
        flags = (
            [f"p{self.dropout}"] * bool(self.dropout)
            + ["bias"] * self.bias
            + ["transposed"] * self.transposed
            + [f"dy{self.grad_scale:.0e}"] * (self.grad_scale != 1)
        )
        return "-".join(
            [self.form.name, f"M{self.M}-N{self.N}-K{self.K}-R{self.R}", SHORT[self.dtype], *flags]
        )

    @property
    def factor_dtype(self) -> torch.dtype:
        """The dtype of the factors: adapter_dtype, else fp32, fp64 beside fp64."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.adapter_dtype or wide

    @property
    def works(self) -> bool:
        """False for keep="output" with a mask on the base term, which exclude each other."""
        return not (self.form.keep == "output" and self.form.dropout_on == "both" and self.dropout)


def make(
    case: Case, seed: int = 0, device: torch.device | str = "cpu", sliced: bool = True
) -> dict[str, torch.Tensor | None]:
    """Return every tensor of the case by its name in lorafast.linear, and dy.

    x and dy are slices of wider tensors, so that no stride is trivial, unless sliced=False. A
    transposed weight lies in memory as [K,N].
    """
    generator = torch.Generator(device).manual_seed(seed)
    left, right = (1, 2) if sliced else (0, 0)
    form, factor = case.form, case.factor_dtype

    def normal(*shape: int, dtype: torch.dtype = factor, scale: float = 1.0) -> torch.Tensor:
        return (
            torch.randn(shape, generator=generator, dtype=torch.float64, device=device) * scale
        ).to(dtype)

    def rows(width: int, scale: float = 1.0) -> torch.Tensor:
        return normal(case.M, left + width + right, dtype=case.dtype, scale=scale)[
            :, left : left + width
        ]

    weight = normal(case.N, case.K, dtype=case.dtype, scale=case.K**-0.5)
    core = {"none": None, "diagonal": (case.R,), "full": (case.R, case.R)}[form.core]
    gains = case.N if form.axis == "out" else case.K
    return {
        "x": rows(case.K),
        "weight": weight.t().contiguous().t() if case.transposed else weight,
        "bias": normal(case.N, dtype=case.dtype) if case.bias else None,
        "lora_A": normal(case.R, case.K, scale=case.K**-0.5),
        "lora_B": normal(case.N, case.R, scale=case.R**-0.5),
        "core": None if core is None else normal(*core, scale=case.R**-0.5),
        "magnitude": normal(gains).abs() + 0.5 if form.magnitude else None,
        "out_scale": normal(case.N) if form.out_scale else None,
        "lora_bias": normal(case.N) if form.lora_bias else None,
        "seed": torch.randint(0, 2**62, (1,), generator=generator, device=device),
        "dy": rows(case.N, case.grad_scale),
    }


def leaf(
    name: str, value: torch.Tensor | None, wide: bool = False, trained: Iterable[str] = GRADIENTS
) -> torch.Tensor | None:
    """Return the tensor as a leaf that requires grad if it is `trained`; in float64 if wide."""
    if value is None or name == "seed":
        return value
    value = value.double() if wide else value
    return value.detach().requires_grad_(name in trained)
