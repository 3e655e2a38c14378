"""One implementation of one method on a whole model: what trains, how a step goes, and whether its gradients are right."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import lorafast
from lorafast import testing
from lorafast.bench import compiled, peers, recipes, trust
from lorafast.bench.clock import Mark, Step
from lorafast.bench.contender import PARTS, form_of, parts_of
from lorafast.bench.encoder import Classifier, Encoder
from lorafast.bench.impl import Impl
from lorafast.bench.refusal import Unable
from lorafast.bench.textbook import TRAINS, EagerLinear, replaced
from lorafast.methods.adapter import Adapter
from lorafast.methods.lamda import LaMDA
from lorafast.schedule import LaMDAFreeze

Batch = dict[str, torch.Tensor]

# AdamW's learning rates: the head's under every method, and the encoder's where all of it trains.
HEAD_RATE = 1e-3
WHOLE_RATE = 1e-4


@dataclass
class Trainee:
    """layers: every adapted layer by its path in the model. `module` is what is called, the model or its compiled form.

    optimizers: the encoder's last, if it has one of its own.
    """

    impl: Impl
    method: str
    adapter: Adapter | None
    model: Classifier
    module: nn.Module
    layers: dict[str, nn.Module]
    optimizers: tuple[torch.optim.Optimizer, ...]
    schedule: recipes.Schedule | None
    trainable: tuple[int, int]  # elements and bytes at the start; a schedule may freeze what trains
    flags: dict[str, bool]  # what of the model trained at the start, by name

    @property
    def whole(self) -> bool:
        """Whether the encoder's own weights train."""
        return self.impl.base == "full" or (self.impl.adapts and self.adapter is None)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross entropy of a batch."""
        return _loss(self.module, batch)

    def step(self, batch: Batch, seed: int, losses: list[torch.Tensor] | None = None) -> Step:
        """Forward, backward, optimizer, in three phases; its dropout masks follow from the seed, whoever went before."""

        penalty = getattr(self.schedule, "penalty", None)

        def step(mark: Mark) -> None:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            torch.manual_seed(seed)
            mark()
            loss = self.loss(batch)
            total = loss if penalty is None else loss + penalty()
            mark()
            total.backward()
            mark()
            for optimizer in self.optimizers:
                optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
            mark()
            if losses is not None:
                losses.append(loss.detach())

        return step

    @torch.no_grad()
    def accuracy(self, batches: list[Batch]) -> float:
        """The share of examples whose most likely label is theirs."""
        self.model.eval()
        right = sum(
            (self.model(b["input_ids"], b["attention_mask"]).argmax(-1) == b["labels"]).sum().item()
            for b in batches
        )
        self.model.train()
        return right / sum(len(batch["labels"]) for batch in batches)

    def thaw(self) -> None:
        """What trains is what trained at the start, and no schedule changes it any more."""
        self.schedule = None
        for layer in self.layers.values():
            if isinstance(getattr(layer, "adapter", None), LaMDA):
                layer.freeze_columns(0)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.flags[name])
            if not self.flags[name]:
                parameter.grad = None

    def error(self, batch: Batch, seed: int) -> tuple[float, str]:
        """The worst error ratio of the logits and of every kind of gradient over all layers, as in training, factors random."""
        R = self.adapter.r if self.adapter else 0
        return trust.worst(
            self._error(batch, seed, count) for count in trust.stages(self.impl, self.method, R)
        )

    def _error(self, batch: Batch, seed: int, frozen: int) -> tuple[float, str]:
        copied = copy.deepcopy(self.model)
        layers = {path: copied.get_submodule(path) for path in self.layers}
        if self.whole:
            copied.requires_grad_(True)  # whatever a schedule has frozen just now
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in layers.values():
                for part in parts_of(layer).values():
                    # Where B is 0, A has no gradient to be wrong about.
                    noise = torch.randn(part.shape, generator=generator) * 0.02
                    part.add_(noise.to(part.device, part.dtype))
        share = frozen / self.adapter.r if frozen else 0.0
        columns = {
            path: round(share * parts_of(layer)["lora_A"].shape[0])
            for path, layer in layers.items()
        }
        chained = {path: self._eager_linear(layer, columns[path]) for path, layer in layers.items()}
        trains = TRAINS[self.method] if self.adapter else frozenset()
        trains -= {"lora_B"} if self.adapter and frozen == self.adapter.r else set()
        truth, eager = (
            _outcome(replaced(copied, chained, trains, self.whole, wide), batch, seed)
            for wide in (True, False)
        )
        for path, layer in layers.items():
            if frozen:
                layer.freeze_columns(columns[path])
            if not self.impl.ours:
                peers.mask(layer)
        if self.impl.compile:
            compiled.forget()
            copied = compiled.compiled(copied, torchs_draws=True)
        ours = _outcome(copied, batch, seed)
        floor = torch.finfo(next(self.model.encoder.parameters()).dtype).eps / 8
        # What is there on one side alone is a factor that does not train, or one that must not.
        ratios = {
            name: _ratio(ours.get(name), eager.get(name), truth.get(name), floor)
            for name in truth | ours
        }
        worst = max(ratios, key=ratios.get)
        return ratios[worst], trust.at_stage(worst, frozen, self.adapter.r if self.adapter else 0)

    def _eager_linear(self, layer: nn.Module, frozen: int) -> EagerLinear:
        parts = parts_of(layer)
        form = form_of(self.impl, self.method, self.adapter, parts)
        ours = isinstance(layer, lorafast.Linear)
        scaling, base = (
            (float(layer.scaling), layer) if ours else (self.adapter.scaling, layer.base_layer)
        )
        return EagerLinear(form, scaling, self.adapter.dropout, base, parts, frozen=frozen)


def _outcome(model: nn.Module, batch: Batch, seed: int) -> dict[str, torch.Tensor]:
    """The logits, and the gradients by kind over all layers: of a single number an error ratio says nothing."""
    model.zero_grad()
    torch.manual_seed(seed)
    logits = model(batch["input_ids"], batch["attention_mask"])
    F.cross_entropy(logits, batch["labels"]).backward()
    found: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():  # a compiled model's are those of the model
        if parameter.grad is not None:
            kind = next((part for part in PARTS.values() if part in name), "other parameters")
            found.setdefault(kind, []).append(parameter.grad.double().flatten())
    return {"logits": logits.detach().double()} | {
        name: torch.cat(grads) for name, grads in found.items()
    }


def _ratio(
    ours: torch.Tensor | None, eager: torch.Tensor | None, truth: torch.Tensor | None, floor: float
) -> float:
    if ours is None or truth is None or ours.shape != truth.shape:
        return math.inf
    return testing.ratio(
        (ours - truth).norm().item(), (eager - truth).norm().item(), truth.norm().item(), floor
    )


def build(
    impl: Impl, method: str, adapter: Adapter | None, encoder: Encoder, seed: int, lr: float, total_steps: int, R: int = 16,
    batches: Sequence[Batch] = (),
) -> Trainee:  # fmt: skip
    """A trainee on a copy of the encoder. R: of what has no adapter; batches: for a start that reads gradients. Raises Unable."""
    if impl.base == "eager":
        raise Unable("missing", "the bench writes one layer by hand, and no whole model")
    if impl.by_peft:
        peers.check(impl, method, next(encoder.model.parameters()).dtype)
    recipe = recipes.RECIPES[method] if impl.adapts else recipes.Recipe(lr)
    base = copy.deepcopy(encoder.model)
    # The frozen model's backward goes through every layer only if its input asks for a gradient; all others are treated alike.
    base.enable_input_require_grads()
    base.requires_grad_(impl.base == "full" or (impl.adapts and adapter is None))
    model = Classifier(base, base.config.hidden_size, seed, next(base.parameters()).device)
    torch.manual_seed(seed)
    if impl.by_peft:
        model.encoder = peers.model(base, impl, method, adapter, "all-linear")
    with _refusals():
        if not impl.by_peft and impl.adapts and adapter is not None:
            _adapt(model, adapter, recipe, batches)
        model.train()
        named = model.named_modules()
        layers = {
            path: module
            for path, module in named
            if isinstance(module, lorafast.Linear) or peers.is_layer(module)
        }
        if method in peers.BUILT:
            _start_alike(layers, seed)
        optimizers = _optimizers(model, recipe, lr, R)
        schedule = _schedule(model, recipe, optimizers[-1], total_steps, impl.compile)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable = (sum(p.numel() for p in trained), sum(p.numel() * p.itemsize for p in trained))
    module = compiled.compiled(model) if impl.compile else model
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return Trainee(
        impl, method, adapter, model, module, layers, optimizers, schedule, trainable, flags
    )


def _adapt(
    model: Classifier, adapter: Adapter, recipe: recipes.Recipe, batches: Sequence[Batch]
) -> None:
    base, pattern = model.encoder, None
    if recipe.sampled:
        adapter = recipes.sampled(adapter, base, batches, lambda _, batch: _loss(model, batch))
    if recipe.spread:
        pattern = recipes.spread(base, adapter.r)
    lorafast.adapt(base, adapter, rank_pattern=pattern)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What a method cannot do with what was asked: a rank some shape has no room for, too few steps for a schedule."""
    try:
        yield
    except ValueError as error:
        raise Unable("unsupported", str(error)) from None


def _optimizers(
    model: Classifier, recipe: recipes.Recipe, lr: float, R: int
) -> tuple[torch.optim.Optimizer, ...]:
    groups = [{"params": list(model.head.parameters()), "lr": HEAD_RATE}]
    if recipe.optimizer is not None:
        return torch.optim.AdamW(groups, weight_decay=0.0), recipe.optimizer(model.encoder, lr, R)
    if trained := [
        parameter for parameter in model.encoder.parameters() if parameter.requires_grad
    ]:
        groups.append({"params": trained, "lr": lr})
    return (torch.optim.AdamW(groups, weight_decay=0.0),)


def _schedule(
    model: Classifier,
    recipe: recipes.Recipe,
    optimizer: torch.optim.Optimizer,
    steps: int,
    compile: bool,
) -> recipes.Schedule | None:
    if recipe.schedule is None or not steps:
        return None
    schedule = recipe.schedule(model.encoder, optimizer, steps)
    if compile and isinstance(schedule, LaMDAFreeze):
        # Every change of how many are frozen is compiled anew, a model in half a minute.
        schedule.group = max(1, schedule.layers[0].r // 4)
    return schedule


@torch.no_grad()
def _start_alike(layers: dict[str, nn.Module], seed: int) -> None:
    """Trained A factors start alike for all that have them."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        A = parts_of(layer)["lora_A"]
        if A.requires_grad:
            start = (torch.rand(A.shape, generator=generator) * 2 - 1) / A.shape[1] ** 0.5
            A.copy_(start)


def _loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross entropy of a batch."""
    return F.cross_entropy(module(batch["input_ids"], batch["attention_mask"]), batch["labels"])
