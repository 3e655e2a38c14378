"""AFLoRA's adaptive freezing (arXiv 2403.13269): a layer's A, or its B, stops training for good once it matters little.

Step t = 0, 1, … of T. I is the mean of |gradient| over a window of deltaT steps; every matrix is judged by itself, and windows
begin at the multiples of deltaT. There, with the last window's I:
    Ī = β1 Ī + (1-β1) I,   U = β2 U + (1-β2) |I - Ī|,   score = Ī⊙U, an element each
    threshold = the k-th smallest of the n scores of all that trains,  k = ⌊n (1-v)⌋;  what has a mean score below it freezes
    v(t) = 1 up to step warmup, then (1 - (t - warmup)/(T - warmup - final))³, and 0 from T - final on, when all freezes
These are the rules of the authors' code, which counts warmup and final in epochs. It looks at gradients once a micro-batch and
before clipping, here it is once a step and as the optimizer met them. What of it is in the paper's text could not be checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from lorafast.engine import checks
from lorafast.methods import aflora
from lorafast.models.module_names import adapted, some
from lorafast.nn.adapter_layer import AdapterLayer

_PARTS = ("lora_A", "lora_B")
_SETTINGS = ("total_steps", "warmup", "final", "deltaT", "beta1", "beta2")


class AFLoRA:
    """Freezes lora_A and lora_B of the model's AFLoRA layers, each when its score falls behind the others', all by T - final.

    step() comes after optimizer.step() and before zero_grad(), whose gradients it reads; a gradient that is not finite counts as 0.
    warmup, final: steps, or as a float below 1 a share of total_steps (the defaults are the 1 and 14 of 20 epochs of the authors'
    GLUE scripts). A frozen matrix has requires_grad False and no gradient, so that optimizers pass it over and it stays as it is,
    bit for bit; in a process group, where DDP waits for the gradients it was built with, it gets zeros instead, and step() undoes
    what the optimizer makes of them. What was frozen when training began is not judged. Costs three numbers an element that trains.
    ValueError for bad settings, RuntimeError if nothing that trains has a gradient, NotImplementedError for sharded factors.
    """

    paper: ClassVar[str] = "arXiv 2403.13269"
    trains: ClassVar[str] = "A and B until frozen"
    keeps: ClassVar[str] = "x by reference until A is frozen"

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        warmup: float = 0.05,
        final: float = 0.7,
        deltaT: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.95,
    ) -> None:
        layers = adapted(model, required=False)
        layers = {
            name: layer
            for name, layer in layers.items()
            if isinstance(layer.adapter, aflora.AFLoRA)
        }
        if not layers:
            raise ValueError(
                f"model {type(model).__name__} has no layer with a lorafast.AFLoRA adapter"
            )
        self._matrices = {
            f"{name}.{part}": _Matrix(layer, part)
            for name, layer in layers.items()
            for part in _PARTS
        }
        self._set(0, total_steps, warmup, final, deltaT, beta1, beta2)

    @property
    def frozen(self) -> list[str]:
        """The names of the matrices that are frozen."""
        return [name for name, matrix in self._matrices.items() if matrix.frozen]

    def keep(self, step: int) -> float:
        """v: the share of scores that lies above the threshold at this step, from 1 down to 0."""
        if step <= self._first:
            return 1.0
        if step >= self._last:
            return 0.0
        return (1 - (step - self._first) / (self._last - self._first)) ** 3

    @torch.no_grad()
    def step(self) -> None:
        """Take the gradients into the scores; freeze what is due."""
        live = [matrix for matrix in self._matrices.values() if matrix.live]
        _refuse_unready(live)
        for matrix in self._matrices.values():
            matrix.restore()
        begins = self.last_step % self.deltaT == 0
        for matrix in live:
            if begins:
                matrix.close_window(self.beta1, self.beta2)
            matrix.observe()
        if not (keep := self.keep(self.last_step)) or begins:
            for matrix in _below(live, keep) if keep else live:
                matrix.freeze()
        self.last_step += 1

    def state_dict(self) -> dict[str, Any]:
        """The step count, the settings, what is frozen and the scores of what is not; frozen values are in the model's state."""
        scores = {
            name: vars(matrix.score).copy()
            for name, matrix in self._matrices.items()
            if matrix.score is not None
        }
        told = {name: getattr(self, name) for name in ("last_step", *_SETTINGS)}
        return told | {"frozen": self.frozen, "scores": scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved schedule, before or after the model's state is loaded. ValueError, and no change, if it is no such."""
        if state.keys() != (own := self.state_dict()).keys():
            raise ValueError(f"state {sorted(state)} must hold {sorted(own)}")
        frozen, scores = state["frozen"], state["scores"]
        if unknown := [name for name in (*frozen, *scores) if name not in self._matrices]:
            raise ValueError(f"state is of another model: this one has no {some(unknown)}")
        loaded = {name: self._matrices[name].of(score) for name, score in scores.items()}
        self._set(state["last_step"], *(state[name] for name in _SETTINGS))
        for name, matrix in self._matrices.items():
            matrix.score = loaded.get(name)
            if name in frozen:
                matrix.freeze()
            elif matrix.frozen:
                matrix.thaw()

    def _set(
        self,
        last_step: int,
        total_steps: int,
        warmup: float,
        final: float,
        deltaT: int,
        beta1: float,
        beta2: float,
    ) -> None:
        for name, value in (("total_steps", total_steps), ("deltaT", deltaT)):
            checks.whole(name, value)
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"{name}={value!r} must be a number in [0, 1)")
        first, last = (
            _steps("warmup", warmup, total_steps),
            total_steps - _steps("final", final, total_steps),
        )
        if first >= last:
            raise ValueError(
                f"warmup={warmup!r} and final={final!r} leave none of total_steps={total_steps} between them"
            )
        self.last_step, self.total_steps, self.warmup, self.final = (
            last_step,
            total_steps,
            warmup,
            final,
        )
        self.deltaT, self.beta1, self.beta2, self._first, self._last = (
            deltaT,
            beta1,
            beta2,
            first,
            last,
        )


@dataclass
class _Score:
    """I so far, of how many steps, and Ī and U as the last full window left them; a number an element, in fp32 or wider."""

    window: torch.Tensor
    count: int
    sensitivity: torch.Tensor
    uncertainty: torch.Tensor


class _Matrix:
    """lora_A or lora_B of a layer, and its scores while it trains."""

    def __init__(self, layer: AdapterLayer, part: str) -> None:
        self.layer, self.part = layer, part
        self.score: _Score | None = None
        # In a process group: the value to go back to, and what makes the gradient zero.
        self._held: torch.Tensor | None = None
        self._hook: Any = None

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.layer, self.part)

    @property
    def frozen(self) -> bool:
        return self.part in self.layer.frozen_parts

    @property
    def live(self) -> bool:
        return self.parameter.requires_grad and not self.frozen

    def observe(self) -> None:
        """One step's gradient into the window's mean."""
        if (gradient := self.parameter.grad) is None:
            return
        score = self._started()
        score.count += 1
        size = gradient.abs().to(score.window.dtype).nan_to_num_(0.0, 0.0, 0.0)
        score.window.lerp_(size, 1 / score.count)

    def close_window(self, beta1: float, beta2: float) -> None:
        """The window's mean into Ī and U; a window without a gradient is none."""
        score = self._started()
        if score.count:
            score.sensitivity.lerp_(score.window, 1 - beta1)
            score.uncertainty.lerp_((score.window - score.sensitivity).abs_(), 1 - beta2)
            score.window.zero_()
            score.count = 0

    def product(self) -> torch.Tensor:
        """Ī⊙U, flat."""
        score = self._started()
        return (score.sensitivity * score.uncertainty).flatten()

    def of(self, state: dict[str, Any]) -> _Score:
        """A score from a state dict. ValueError if it is of another shape."""
        own = self._new()
        if state.keys() != vars(own).keys():
            raise ValueError(f"a score {sorted(state)} of the state must hold {sorted(vars(own))}")
        for name in ("window", "sensitivity", "uncertainty"):
            held = getattr(own, name)
            if state[name].shape != held.shape:
                raise ValueError(
                    f"{name} {tuple(state[name].shape)} of the state must be {tuple(held.shape)} for {self.part}"
                )
            held.copy_(state[name])
        own.count = state["count"]
        return own

    def freeze(self) -> None:
        """No gradient from now on; in a process group one of zeros."""
        self.layer.frozen_parts |= {self.part}
        self.score = None
        self.parameter.grad = None
        if not (dist.is_available() and dist.is_initialized()):
            self.parameter.requires_grad_(False)
        elif self._hook is None:
            self._hook = self.parameter.register_hook(self._hold)

    def thaw(self) -> None:
        """Undo freeze()."""
        self.layer.frozen_parts -= {self.part}
        self.parameter.requires_grad_(True)
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._held = None

    def restore(self) -> None:
        """Undo what an optimizer's momentum and decay made of a gradient of zeros."""
        if self._held is not None:
            self.parameter.copy_(self._held)
            self.parameter.grad = self._held = None

    def _hold(self, gradient: torch.Tensor) -> torch.Tensor:
        # Taken in backward: what has been loaded since the last step is then what stays.
        self._held = self.parameter.detach().clone()
        return torch.zeros_like(gradient)

    def _started(self) -> _Score:
        if self.score is None:
            self.score = self._new()
        return self.score

    def _new(self) -> _Score:
        like = self.parameter.detach()
        zeros = [
            torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
            for _ in range(3)
        ]
        return _Score(zeros[0], 0, zeros[1], zeros[2])


def _below(live: list[_Matrix], keep: float) -> list[_Matrix]:
    """Those whose mean score is below the threshold that leaves a share `keep` of all scores above it."""
    scores = [matrix.product() for matrix in live]
    k = int(sum(score.numel() for score in scores) * (1 - keep))
    if not k:
        return []
    everything = torch.cat([score.to(scores[0].device) for score in scores])
    threshold = everything.kthvalue(k).values
    means = torch.cat([score.mean()[None].to(everything) for score in scores])
    # One wait for the device, not one a matrix.
    return [matrix for matrix, low in zip(live, (means < threshold).tolist(), strict=True) if low]


def _refuse_unready(live: list[_Matrix]) -> None:
    for matrix in live:
        if hasattr(matrix.parameter, "full_tensor"):
            shape = tuple(matrix.parameter.shape)
            raise NotImplementedError(
                f"{matrix.part} {shape} is a sharded DTensor: AFLoRA compares all scores of all layers"
            )
    if live and all(matrix.parameter.grad is None for matrix in live):
        raise RuntimeError(
            "no lora_A or lora_B that trains has a gradient: step() comes after backward() and before zero_grad()"
        )


def _steps(name: str, value: float, total_steps: int) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not whole and not (isinstance(value, float) and 0 <= value < 1):
        raise ValueError(
            f"{name}={value!r} must be a count of steps, or a share of total_steps as a float in [0, 1)"
        )
    return value if whole else round(value * total_steps)
