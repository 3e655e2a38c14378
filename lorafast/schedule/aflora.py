"""AFLoRA's adaptive freezing of A and B (arXiv:2403.13269)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from lorafast.engine import checks
from lorafast.methods import aflora
from lorafast.models.module_names import adapter_layers, format_names
from lorafast.nn.adapter_layer import AdapterLayer

_TENSORS = ("lora_A", "lora_B")
_SETTINGS = ("total_steps", "warmup", "final", "deltaT", "beta1", "beta2")


class AFLoRA:
    """The schedule of AFLoRA: every lora_A and lora_B freezes for good when its score is low.

        Ī ← β₁Ī + (1 - β₁) I,    U ← β₂U + (1 - β₂)|I - Ī|,    score = Ī ⊙ U, per element
        v(t) = 1 up to step warmup, then (1 - (t - warmup)/(T - warmup - final))³, then 0

    I is the mean of |gradient| over a window of deltaT steps; windows begin at the multiples of
    deltaT. There Ī, U and the scores are updated with the last window, and of the n scores of all
    matrices that still train the k-th smallest is the threshold, k = ⌊n (1 - v)⌋. A matrix whose
    mean score is below the threshold freezes. From step T - final on, v = 0 and all are frozen.

    Call `step()` after optimizer.step() and before zero_grad(), because it reads the gradients. A
    gradient that is not finite counts as 0. A frozen matrix has requires_grad False and no
    gradient, so that an optimizer skips it and it stays constant bit for bit; in a process group,
    where DDP waits for every gradient that it was built with, it gets a gradient of zeros instead,
    and `step()` undoes what the optimizer makes of it. A matrix that was frozen before is not
    scored. The schedule holds three numbers, fp32 or wider, per element that trains.

    These are the rules of the authors' code, which counts warmup and final in epochs and reads
    gradients once per micro-batch and before clipping; here they are read once per step, as the
    optimizer sees them. The rules could not be checked against the paper's text.

    Args:
        model: a model with `lorafast.AFLoRA` adapters.
        total_steps: T, the number of optimizer steps of the run, at least 1.
        warmup: steps before the first matrix may freeze: an int, or as a float in [0, 1) a share of
            total_steps. The default is 1 of the 20 epochs of the authors' GLUE scripts.
        final: steps at the end in which all matrices are frozen, in the same form. The default is
            14 of 20 epochs.
        deltaT: steps of a window, at least 1.
        beta1: β₁, in [0, 1).
        beta2: β₂, in [0, 1).

    Raises:
        TypeError: model is no module.
        ValueError: the model has no AFLoRA layer, or an argument is out of range.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        lorafast.adapt(model, lorafast.AFLoRA(r=4))
        optimizer = torch.optim.AdamW(lorafast.adapter_parameters(model), lr=1e-3)
        schedule = lorafast.schedule.AFLoRA(model, total_steps=20, deltaT=2)
        for _ in range(20):
            model(torch.randn(4, 64)).square().mean().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    Source:
        arXiv:2403.13269
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
        layers = {
            name: layer
            for name, layer in adapter_layers(model, required=False).items()
            if isinstance(layer.adapter, aflora.AFLoRA)
        }
        if not layers:
            raise ValueError(
                f"model {type(model).__name__} has no layer with a lorafast.AFLoRA adapter"
            )
        self._matrices = {
            f"{name}.{tensor_name}": _Matrix(layer, tensor_name)
            for name, layer in layers.items()
            for tensor_name in _TENSORS
        }
        self._configure(0, total_steps, warmup, final, deltaT, beta1, beta2)

    @property
    def frozen(self) -> list[str]:
        """The names of the frozen matrices, in module order, such as "0.lora_A"."""
        return [name for name, matrix in self._matrices.items() if matrix.frozen]

    def parameters(self) -> list[nn.Parameter]:
        """Return the Parameters that train at some time: an optimizer must have all of them.

        Returns:
            Every lora_A and lora_B, without those that were frozen before.
        """
        return [
            matrix.parameter for matrix in self._matrices.values() if matrix.live or matrix.frozen
        ]

    def keep(self, step: int) -> float:
        """Return v, the share of the scores that is above the threshold.

        Args:
            step: the step t, counted from 0.

        Returns:
            A number that falls from 1 to 0 over the run.
        """
        if step <= self._warmup_end:
            return 1.0
        if step >= self._final_begin:
            return 0.0
        return (1 - (step - self._warmup_end) / (self._final_begin - self._warmup_end)) ** 3

    @torch.no_grad()
    def step(self) -> None:
        """Update the scores with the gradients of this step, and freeze the matrices that are due.

        Raises:
            NotImplementedError: a factor is sharded.
            RuntimeError: matrices train, and none has a gradient.
        """
        live = [matrix for matrix in self._matrices.values() if matrix.live]
        _check_gradients(live)
        for matrix in self._matrices.values():
            matrix.restore()
        window_begins = self.last_step % self.deltaT == 0
        for matrix in live:
            if window_begins:
                matrix.close_window(self.beta1, self.beta2)
            matrix.observe_gradient()
        keep = self.keep(self.last_step)
        if keep == 0:
            due = live
        elif window_begins:
            due = _below_threshold(live, keep)
        else:
            due = []
        for matrix in due:
            matrix.freeze()
        self.last_step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule.

        Returns:
            "last_step", the settings, "frozen" (names of matrices) and "scores" (the averages of
            each matrix that trains). The frozen values are in the model's state dict.
        """
        state: dict[str, Any] = {"last_step": self.last_step}
        state |= {name: getattr(self, name) for name in _SETTINGS}
        state["frozen"] = self.frozen
        state["scores"] = {
            name: vars(matrix.score).copy()
            for name, matrix in self._matrices.items()
            if matrix.score is not None
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved schedule, before or after the model's state is loaded.

        Args:
            state: a result of `state_dict`.

        Raises:
            ValueError: the state is not one of this model. Nothing has changed then.
        """
        expected = self.state_dict()
        if state.keys() != expected.keys():
            raise ValueError(f"state {sorted(state)} must hold {sorted(expected)}")
        frozen, scores = state["frozen"], state["scores"]
        unknown = [name for name in (*frozen, *scores) if name not in self._matrices]
        if unknown:
            raise ValueError(f"state is of another model: this one has no {format_names(unknown)}")
        loaded = {name: self._matrices[name].load_score(score) for name, score in scores.items()}
        self._configure(state["last_step"], *(state[name] for name in _SETTINGS))
        for name, matrix in self._matrices.items():
            matrix.score = loaded.get(name)
            if name in frozen:
                matrix.freeze()
            elif matrix.frozen:
                matrix.unfreeze()

    def _configure(
        self,
        last_step: int,
        total_steps: int,
        warmup: float,
        final: float,
        deltaT: int,
        beta1: float,
        beta2: float,
    ) -> None:
        checks.whole("last_step", last_step, 0)
        checks.whole("total_steps", total_steps)
        checks.whole("deltaT", deltaT)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta < 1:
                raise ValueError(f"{name}={beta!r} must be a number in [0, 1)")
        warmup_end = _step_count("warmup", warmup, total_steps)
        final_begin = total_steps - _step_count("final", final, total_steps)
        if warmup_end >= final_begin:
            raise ValueError(
                f"warmup={warmup!r} and final={final!r} leave none of total_steps={total_steps} "
                "between them"
            )
        self.last_step, self.total_steps = last_step, total_steps
        self.warmup, self.final, self.deltaT = warmup, final, deltaT
        self.beta1, self.beta2 = beta1, beta2
        self._warmup_end, self._final_begin = warmup_end, final_begin


@dataclass
class _Score:
    """The averages of one matrix, per element, in fp32 or wider.

    window is the mean I of the current window and count its number of steps; sensitivity is Ī and
    uncertainty U, after the last full window. The field names are keys of the state dict.
    """

    window: torch.Tensor
    count: int
    sensitivity: torch.Tensor
    uncertainty: torch.Tensor


class _Matrix:
    """lora_A or lora_B of a layer, with its score while it trains."""

    def __init__(self, layer: AdapterLayer, tensor_name: str) -> None:
        self.layer, self.tensor_name = layer, tensor_name
        self.score: _Score | None = None
        # In a process group: the frozen value, and the hook that makes the gradient zero.
        self._frozen_value: torch.Tensor | None = None
        self._hook: RemovableHandle | None = None

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.layer, self.tensor_name)

    @property
    def frozen(self) -> bool:
        return self.tensor_name in self.layer.frozen_parts

    @property
    def live(self) -> bool:
        """True if the matrix trains."""
        return self.parameter.requires_grad and not self.frozen

    def observe_gradient(self) -> None:
        """Update the window's mean with the gradient of this step."""
        gradient = self.parameter.grad
        if gradient is None:
            return
        score = self._get_score()
        score.count += 1
        size = gradient.abs().to(score.window.dtype).nan_to_num_(0.0, 0.0, 0.0)
        score.window.lerp_(size, 1 / score.count)

    def close_window(self, beta1: float, beta2: float) -> None:
        """Update Ī and U with the window's mean. A window without a gradient does not count."""
        score = self._get_score()
        if score.count:
            score.sensitivity.lerp_(score.window, 1 - beta1)
            score.uncertainty.lerp_((score.window - score.sensitivity).abs_(), 1 - beta2)
            score.window.zero_()
            score.count = 0

    def scores(self) -> torch.Tensor:
        """Return Ī ⊙ U, flattened."""
        score = self._get_score()
        return (score.sensitivity * score.uncertainty).flatten()

    def load_score(self, state: dict[str, Any]) -> _Score:
        """Return the score of a state dict. ValueError if its keys or shapes are others."""
        score = self._new_score()
        if state.keys() != vars(score).keys():
            raise ValueError(
                f"a score {sorted(state)} of the state must hold {sorted(vars(score))}"
            )
        for name in ("window", "sensitivity", "uncertainty"):
            average = getattr(score, name)
            if state[name].shape != average.shape:
                raise ValueError(
                    f"{name} {tuple(state[name].shape)} of the state must be "
                    f"{tuple(average.shape)} for {self.tensor_name}"
                )
            average.copy_(state[name])
        score.count = state["count"]
        return score

    def freeze(self) -> None:
        """Compute no gradient from now on; in a process group, one of zeros."""
        self.layer.frozen_parts |= {self.tensor_name}
        self.score = None
        self.parameter.grad = None
        if not (dist.is_available() and dist.is_initialized()):
            self.parameter.requires_grad_(False)
        elif self._hook is None:
            self._hook = self.parameter.register_hook(self._zero_gradient)

    def unfreeze(self) -> None:
        """Undo freeze()."""
        self.layer.frozen_parts -= {self.tensor_name}
        self.parameter.requires_grad_(True)
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._frozen_value = None

    def restore(self) -> None:
        """Undo what an optimizer's momentum and weight decay made of a gradient of zeros."""
        if self._frozen_value is not None:
            self.parameter.copy_(self._frozen_value)
            self.parameter.grad = self._frozen_value = None

    def _zero_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        if not self.frozen:  # after AdapterLayer.unfreeze()
            return gradient
        # The value is copied in backward, so that one loaded since the last step is kept.
        self._frozen_value = self.parameter.detach().clone()
        return torch.zeros_like(gradient)

    def _get_score(self) -> _Score:
        if self.score is None:
            self.score = self._new_score()
        return self.score

    def _new_score(self) -> _Score:
        parameter = self.parameter.detach()
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        window, sensitivity, uncertainty = (
            torch.zeros_like(parameter, dtype=dtype) for _ in range(3)
        )
        return _Score(window, 0, sensitivity, uncertainty)


def _below_threshold(live: list[_Matrix], keep: float) -> list[_Matrix]:
    """Return the matrices whose mean score is below the threshold.

    The threshold leaves a share `keep` of the scores of all matrices above it.
    """
    scores = [matrix.scores() for matrix in live]
    k = int(sum(score.numel() for score in scores) * (1 - keep))
    if not k:
        return []
    all_scores = torch.cat([score.to(scores[0].device) for score in scores])
    threshold = all_scores.kthvalue(k).values
    means = torch.cat([score.mean()[None].to(all_scores) for score in scores])
    # One transfer from the device for all matrices.
    is_below = (means < threshold).tolist()
    return [matrix for matrix, below in zip(live, is_below, strict=True) if below]


def _check_gradients(live: list[_Matrix]) -> None:
    for matrix in live:
        if hasattr(matrix.parameter, "full_tensor"):
            shape = tuple(matrix.parameter.shape)
            raise NotImplementedError(
                f"{matrix.tensor_name} {shape} is a sharded DTensor: "
                "AFLoRA compares all scores of all layers"
            )
    if live and all(matrix.parameter.grad is None for matrix in live):
        raise RuntimeError(
            "no lora_A or lora_B that trains has a gradient: "
            "step() comes after backward() and before zero_grad()"
        )


def _step_count(name: str, value: float, total_steps: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if not isinstance(value, float) or not 0 <= value < 1:
        raise ValueError(
            f"{name}={value!r} must be a count of steps, "
            "or a share of total_steps as a float in [0, 1)"
        )
    return round(value * total_steps)
