"""LISA (arXiv 2403.17919): whole weights train, of a few blocks at a time, drawn anew again and again.

    every `every` steps: all blocks freeze, and `active` of them, uniformly and without replacement, train; the rest of the model
    (embeddings, final norm, head) always does
Saved for backward: what torch saves for the blocks that train. A block that does not, below one that does, still passes dx on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorafast.engine import checks
from lorafast.models.module_names import near, unwrapped
from lorafast.nn.adapter_layer import AdapterLayer

_COUNTS = ("last_step", "active", "every")


class LISA:
    """Lets `active` of the blocks in the nn.ModuleList `layers` of a plain model train, others every `every` steps.

    The first are drawn here; then step() comes after optimizer.step() and before zero_grad(). Build the optimizer over all of
    model.parameters(), whatever their requires_grad is: blocks that rest have no gradient, and optimizers pass them over.
    seed: of a generator of its own; None draws one from torch's. optimizer: forget its states of blocks that come to rest, as a
    run with a new optimizer each time would; None keeps them, for when the block's turn comes again, as the authors' code does.
    What in a block was frozen before stays so, and nothing outside the blocks is touched. close(), or the end of a with statement,
    lets all train again. In a process group wrap the model first, in DistributedDataParallel(model, find_unused_parameters=True).
    ValueError, and no change, if a trained parameter of a block is also another block's, or is tied to one outside the blocks (it
    would have to train and rest at once), and for blocks with a lorafast adapter, whose weights do not train.
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
        inner = unwrapped(model)
        _refuse_group(model, seed)
        blocks = _blocks(inner, layers)
        self._trained = [
            [parameter for parameter in block.parameters() if parameter.requires_grad]
            for block in blocks
        ]
        _refuse_shared(inner, layers, self._trained)
        if optimizer is not None:
            _refuse_incomplete(optimizer, layers, self._trained)
        self._optimizer = optimizer
        self._set(0, active, every)
        if seed is None:
            seed = int(torch.randint(1 << 62, ()))
        self._generator = torch.Generator().manual_seed(seed)
        self.chosen: tuple[int, ...] = ()
        self._closed = False
        self._apply(self._draw())

    def step(self) -> None:
        """Count a step; after each `every`, other blocks. RuntimeError once closed."""
        self._refuse_closed()
        self.last_step += 1
        if self.last_step % self.every == 0:
            self._apply(self._draw())

    def close(self) -> None:
        """Let all blocks train again."""
        if not self._closed:
            for parameter in _all(self._trained):
                parameter.requires_grad_(True)
        self._closed = True

    def __enter__(self) -> LISA:
        self._refuse_closed()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """The step count, the settings, how many blocks there are, which train now, and the generator's state."""
        told = {name: getattr(self, name) for name in _COUNTS}
        return told | {
            "blocks": len(self._trained),
            "chosen": list(self.chosen),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved schedule: the blocks that trained then train now. ValueError, and no change, if it is none of ours."""
        self._refuse_closed()
        if state.keys() != (own := self.state_dict()).keys():
            raise ValueError(f"state {sorted(state)} must hold {sorted(own)}")
        if state["blocks"] != own["blocks"]:
            raise ValueError(
                f"state is of a model with blocks={state['blocks']!r}, this one has {own['blocks']}"
            )
        chosen = state["chosen"]
        if len(set(chosen)) != state["active"] or not set(chosen) <= set(range(own["blocks"])):
            raise ValueError(
                f"chosen={chosen!r} of the state must be active={state['active']} of {own['blocks']} blocks"
            )
        self._set(*(state[name] for name in _COUNTS))
        self._generator.set_state(state["generator"].cpu())
        self._apply(tuple(chosen))

    def _set(self, last_step: int, active: int, every: int) -> None:
        for name, value in (("active", active), ("every", every)):
            checks.whole(name, value)
        if active > len(self._trained):
            raise ValueError(
                f"active={active} is more than the {len(self._trained)} blocks there are"
            )
        self.last_step, self.active, self.every = last_step, active, every

    def _draw(self) -> tuple[int, ...]:
        order = torch.randperm(len(self._trained), generator=self._generator, device="cpu")
        return tuple(sorted(order[: self.active].tolist()))

    def _apply(self, chosen: tuple[int, ...]) -> None:
        for index, parameters in enumerate(self._trained):
            for parameter in parameters:
                parameter.requires_grad_(index in chosen)
                if index not in chosen:
                    parameter.grad = None
                    if self._optimizer is not None:
                        self._optimizer.state.pop(parameter, None)
        self.chosen = chosen

    def _refuse_closed(self) -> None:
        if self._closed:
            raise RuntimeError("this LISA is closed: all blocks train again")


def _blocks(model: nn.Module, layers: str) -> nn.ModuleList:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if layers not in lists:
        there = near(str(layers), lists) or (
            f"; there is {', '.join(lists)}" if lists else "; it has none"
        )
        raise ValueError(
            f"layers={layers!r} must name an nn.ModuleList of model {type(model).__name__}{there}"
        )
    for name, module in lists[layers].named_modules():
        if isinstance(module, AdapterLayer):
            raise ValueError(
                f"{layers}.{name} has {module.adapter}: LISA trains a plain model's own weights, and these are frozen"
            )
    return lists[layers]


def _refuse_shared(model: nn.Module, layers: str, blocks: list[list[nn.Parameter]]) -> None:
    """A parameter of two blocks, or of one and of the rest of the model, can not rest and train."""
    within = {
        parameter: index for index, parameters in enumerate(blocks) for parameter in parameters
    }
    if len(within) < sum(map(len, blocks)):
        index, first = next(
            (i, within[p])
            for i, parameters in enumerate(blocks)
            for p in parameters
            if within[p] != i
        )
        raise ValueError(
            f"{layers}.{index} and {layers}.{first} share a parameter: LISA cannot let one train and the other rest"
        )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in within and not name.startswith(f"{layers}."):
            tied = f"{name} {tuple(parameter.shape)} is tied to one of {layers}.{within[parameter]}"
            raise ValueError(f"{tied}: LISA cannot let one train and the other rest")
    if not within:
        raise ValueError(f"layers={layers!r}: no parameter of these blocks trains")


def _refuse_incomplete(
    optimizer: torch.optim.Optimizer, layers: str, blocks: list[list[nn.Parameter]]
) -> None:
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    lacking = sum(parameter not in held for parameter in _all(blocks))
    if lacking:
        raise ValueError(
            f"optimizer lacks {lacking} parameters of {layers}: build it over all of model.parameters()"
        )


def _refuse_group(model: nn.Module, seed: int | None) -> None:
    """Ranks must draw alike, and the reducer must know all blocks and wait for none."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    if seed is None:
        raise ValueError(
            "seed=None in a process group: give every rank the same seed, so that all train the same blocks"
        )
    wrapped = isinstance(model, DistributedDataParallel)
    if not wrapped or not model.find_unused_parameters or model.static_graph:
        raise ValueError(
            f"model {type(model).__name__} in a process group must be in DistributedDataParallel(..., find_unused_parameters=True) "
            "and not static_graph before LISA: it sums the gradients of what trained when it was made, and waits for all of them"
        )


def _all(blocks: list[list[nn.Parameter]]) -> Iterable[nn.Parameter]:
    return (parameter for parameters in blocks for parameter in parameters)
