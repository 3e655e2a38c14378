"""LISA, layerwise importance sampled AdamW (arXiv:2403.17919)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorafast.engine import checks
from lorafast.models.module_names import similar_names, unwrap
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.quantised_linear import why_not_trained


class LISA:
    """LISA: the schedule that trains the whole weights of a few blocks at a time.

    After every `every` steps all blocks freeze, and `active` of them, drawn uniformly without
    replacement, train. The rest of the model (embeddings, final norm, head) always trains. Saved
    for backward: what torch saves for the blocks that train; a frozen block below one that trains
    still computes dx.

    The first blocks are drawn by the constructor. Call `step()` after optimizer.step() and before
    zero_grad(), and build the optimizer over all of model.parameters(): frozen blocks have no
    gradient, and an optimizer skips them. Parameters of a block that were frozen before stay
    frozen, and nothing outside the blocks is changed. `close()`, or the end of a with statement,
    lets all blocks train again.

    In a process group, wrap the model first, in DistributedDataParallel(model,
    find_unused_parameters=True), and pass the same seed on every rank.

    Args:
        model: a model without adapters in its blocks.
        layers: the name of the nn.ModuleList that holds the blocks.
        active: number of blocks that train at a time, at least 1.
        every: number of steps from one draw to the next, at least 1.
        seed: seed of the schedule's own generator; None draws one from torch's generator.
        optimizer: None to keep the optimizer's state of frozen blocks for their next turn, as the
            authors' code does; an optimizer to delete its state of blocks when they freeze, as a
            run with a new optimizer per draw would.

    Raises:
        TypeError: model is no module.
        ValueError: an argument is out of range, `layers` names no nn.ModuleList with blocks, a
            block has an adapter or a quantised weight, two blocks or a block and the rest share a
            parameter that trains, no parameter of the blocks trains, the optimizer lacks some of
            them, or the model is not prepared for a process group. Nothing has changed then.

    Example:
        import torch, lorafast

        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        schedule = lorafast.schedule.LISA(model, layers="layers", active=2, every=20)
        x = torch.randn(4, 16)
        for block in model.layers:
            x = block(x)
        x.square().mean().backward()
        optimizer.step()
        schedule.step()

    Source:
        arXiv:2403.17919
    """

    paper: ClassVar[str] = "arXiv 2403.17919"
    trains: ClassVar[str] = "whole weights of a few blocks at a time, and all outside the blocks"
    keeps: ClassVar[str] = "as torch, for the blocks that train"

    def __init__(
        self,
        model: nn.Module,
        layers: str = "model.layers",
        active: int = 2,
        every: int = 20,
        seed: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        inner = unwrap(model)
        _check_process_group(model, seed)
        blocks = _find_blocks(inner, layers)
        self._block_parameters = [
            [parameter for parameter in block.parameters() if parameter.requires_grad]
            for block in blocks
        ]
        _check_not_shared(inner, layers, self._block_parameters)
        if optimizer is not None:
            _check_optimizer(optimizer, layers, self._block_parameters)
        self._optimizer = optimizer
        self._configure(0, active, every)
        if seed is None:
            seed = int(torch.randint(1 << 62, ()))
        self._generator = torch.Generator().manual_seed(seed)
        # The indices of the blocks that train.
        self.chosen: tuple[int, ...] = ()
        self._closed = False
        self._activate(self._draw())

    def parameters(self) -> list[nn.Parameter]:
        """Return the Parameters that train at some time: an optimizer must have all of them.

        Returns:
            The Parameters of the blocks, without those that were frozen before.
        """
        return list(_flatten(self._block_parameters))

    def step(self) -> None:
        """Count a step, and draw other blocks after every `every` steps.

        Raises:
            RuntimeError: the schedule is closed.
        """
        self._check_open()
        self.last_step += 1
        if self.last_step % self.every == 0:
            self._activate(self._draw())

    def close(self) -> None:
        """Let all blocks train again. Further calls do nothing."""
        if not self._closed:
            for parameter in _flatten(self._block_parameters):
                parameter.requires_grad_(True)
        self._closed = True

    def __enter__(self) -> LISA:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule.

        Returns:
            "last_step", "active", "every", "blocks" (how many there are), "chosen" (the indices of
            those that train) and "generator" (the generator's state).
        """
        return {
            "last_step": self.last_step,
            "active": self.active,
            "every": self.every,
            "blocks": len(self._block_parameters),
            "chosen": list(self.chosen),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved schedule: the blocks that trained then train now.

        Args:
            state: a result of `state_dict`.

        Raises:
            RuntimeError: the schedule is closed.
            ValueError: the state is not one of this model. Nothing has changed then.
        """
        self._check_open()
        expected = self.state_dict()
        if state.keys() != expected.keys():
            raise ValueError(f"state {sorted(state)} must hold {sorted(expected)}")
        blocks = expected["blocks"]
        if state["blocks"] != blocks:
            raise ValueError(
                f"state is of a model with blocks={state['blocks']!r}, this one has {blocks}"
            )
        chosen = state["chosen"]
        if len(set(chosen)) != state["active"] or not set(chosen) <= set(range(blocks)):
            raise ValueError(
                f"chosen={chosen!r} of the state must be active={state['active']} "
                f"of {blocks} blocks"
            )
        self._configure(state["last_step"], state["active"], state["every"])
        self._generator.set_state(state["generator"].cpu())
        self._activate(tuple(chosen))

    def _configure(self, last_step: int, active: int, every: int) -> None:
        checks.whole("last_step", last_step, 0)
        checks.whole("active", active)
        checks.whole("every", every)
        if active > len(self._block_parameters):
            raise ValueError(
                f"active={active} is more than the {len(self._block_parameters)} blocks there are"
            )
        self.last_step, self.active, self.every = last_step, active, every

    def _draw(self) -> tuple[int, ...]:
        blocks = len(self._block_parameters)
        order = torch.randperm(blocks, generator=self._generator, device="cpu")
        return tuple(sorted(order[: self.active].tolist()))

    def _activate(self, chosen: tuple[int, ...]) -> None:
        """Let the blocks of these indices train, and freeze the others."""
        for index, parameters in enumerate(self._block_parameters):
            for parameter in parameters:
                parameter.requires_grad_(index in chosen)
                if index not in chosen:
                    parameter.grad = None
                    if self._optimizer is not None:
                        self._optimizer.state.pop(parameter, None)
        self.chosen = chosen

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this LISA is closed: all blocks train again")


def _find_blocks(model: nn.Module, layers: str) -> nn.ModuleList:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if layers not in lists:
        hint = similar_names(str(layers), lists)
        if not hint:
            hint = f"; there is {', '.join(lists)}" if lists else "; it has none"
        raise ValueError(
            f"layers={layers!r} must name an nn.ModuleList of model {type(model).__name__}{hint}"
        )
    for name, module in lists[layers].named_modules():
        if isinstance(module, AdapterLayer):
            raise ValueError(
                f"{layers}.{name} has {module.adapter}: LISA trains a plain model's own weights, "
                "and these are frozen"
            )
        if why := why_not_trained(module):
            raise ValueError(f"{layers}.{name} cannot train: {why}")
    return lists[layers]


def _check_not_shared(
    model: nn.Module, layers: str, block_parameters: list[list[nn.Parameter]]
) -> None:
    """Raise ValueError if a parameter would have to train and be frozen at once, or none trains."""
    owners: dict[nn.Parameter, int] = {}
    for index, parameters in enumerate(block_parameters):
        for parameter in parameters:
            other = owners.setdefault(parameter, index)
            if other != index:
                raise ValueError(
                    f"{layers}.{other} and {layers}.{index} share a parameter: "
                    "LISA cannot let one train and the other rest"
                )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in owners and not name.startswith(f"{layers}."):
            raise ValueError(
                f"{name} {tuple(parameter.shape)} is tied to one of {layers}.{owners[parameter]}: "
                "LISA cannot let one train and the other rest"
            )
    if not owners:
        raise ValueError(f"layers={layers!r}: no parameter of these blocks trains")


def _check_optimizer(
    optimizer: torch.optim.Optimizer, layers: str, block_parameters: list[list[nn.Parameter]]
) -> None:
    known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    missing = sum(parameter not in known for parameter in _flatten(block_parameters))
    if missing:
        raise ValueError(
            f"optimizer lacks {missing} parameters of {layers}: "
            "build it over all of model.parameters()"
        )


def _check_process_group(model: nn.Module, seed: int | None) -> None:
    """Raise ValueError in a process group without a common seed or without a suitable DDP wrapper.

    The ranks must draw the same blocks, and DDP must know all of them and wait for none.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    if seed is None:
        raise ValueError(
            "seed=None in a process group: give every rank the same seed, "
            "so that all train the same blocks"
        )
    is_ddp = isinstance(model, DistributedDataParallel)
    if not is_ddp or not model.find_unused_parameters or model.static_graph:
        raise ValueError(
            f"model {type(model).__name__} in a process group must be in "
            "DistributedDataParallel(..., find_unused_parameters=True) and not static_graph before "
            "LISA: it sums the gradients of what trained when it was made, "
            "and waits for all of them"
        )


def _flatten(block_parameters: list[list[nn.Parameter]]) -> Iterable[nn.Parameter]:
    return (parameter for parameters in block_parameters for parameter in parameters)
