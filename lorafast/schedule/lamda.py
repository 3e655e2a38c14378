"""LaMDA's gradual freezing of the way up (arXiv 2406.12832): columns of B freeze in order, largest singular value first.

    frozen(t) = min(R, ⌊R·t / (fraction·T)⌋) after step t of T; once all are frozen only the R×R core trains.
The exact formula is not in the paper's reachable text; fraction 0.3 and the order are those of the authors' code.
"""

from __future__ import annotations

from torch import nn

from lorafast.engine import checks
from lorafast.methods.lamda import LaMDA
from lorafast.nn.linear import Linear


class LaMDAFreeze:
    """Freezes lora_B of every LaMDA layer of the model, column by column, over `fraction` of total_steps.

    step() comes after optimizer.step() and before zero_grad(). A frozen column stays bitwise constant whatever the optimizer's
    momentum or weight decay does to it, since each step() writes it back; its gradient is exactly 0 and no longer computed. While
    columns freeze one by one their values are kept once more; when all are, lora_B.requires_grad is False and the copy is gone
    (in a process group both stay, because DDP waits for the gradients it was built with).
    group: how many columns freeze at a time. Under torch.compile every change recompiles, and dynamo gives up after its
    recompile_limit (8): take r/4 there, or set torch._dynamo.config.allow_unspec_int_on_nn_module = True, which needs 3 graphs.
    """

    def __init__(
        self, model: nn.Module, total_steps: int, fraction: float = 0.3, group: int = 1
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        self.layers = [
            m for m in model.modules() if isinstance(m, Linear) and isinstance(m.adapter, LaMDA)
        ]
        if not self.layers:
            raise ValueError(
                f"model {type(model).__name__} has no lorafast.Linear with a LaMDA adapter"
            )
        self._set(0, total_steps, fraction, group)

    def frozen_columns(self, r: int, step: int) -> int:
        """How many of r columns are frozen once `step` steps are done."""
        due = min(r, int(r * step / (self.fraction * self.total_steps) + 1e-9))
        return due if due == r else due - due % self.group

    def step(self) -> None:
        """Write frozen columns back, then freeze those that are due."""
        for layer in self.layers:
            layer.restore_columns()
        self.last_step += 1
        self._freeze()

    def state_dict(self) -> dict[str, float]:
        """The step count and settings; the frozen values themselves are in the model's state."""
        return {
            name: getattr(self, name) for name in ("last_step", "total_steps", "fraction", "group")
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved schedule. The model's state may be loaded before or after: what is frozen is frozen at its values."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"state {sorted(state)} must hold {sorted(self.state_dict())}")
        self._set(**state)
        self._freeze()

    def _set(self, last_step: int, total_steps: int, fraction: float, group: int) -> None:
        for name, value in (("total_steps", total_steps), ("group", group)):
            checks.whole(name, value)
        if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction!r} must be a number in (0, 1]")
        self.last_step, self.total_steps, self.fraction, self.group = (
            last_step,
            total_steps,
            fraction,
            group,
        )

    def _freeze(self) -> None:
        for layer in self.layers:
            due = self.frozen_columns(layer.r, self.last_step)
            if due != layer.frozen_columns:
                layer.freeze_columns(due)
