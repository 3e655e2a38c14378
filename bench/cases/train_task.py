"""A training task: one implementation of one method on a whole model, and its gradients' error."""

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
from lorafast.bench.cases import peft_baseline, quantised_base, recipes
from lorafast.bench.cases.adapted_model import (
    adapted_layers,
    eager_linear,
    init_A,
    randomize,
)
from lorafast.bench.cases.candidate import ARGUMENTS, adapter_parameters
from lorafast.bench.cases.choices import DENSE
from lorafast.bench.cases.encoder import Classifier, Encoder
from lorafast.bench.cases.expected_grads import TRAINED, with_eager_layers
from lorafast.bench.cases.implementations import Impl
from lorafast.bench.errors import Unavailable
from lorafast.bench.measure import compiled, correctness
from lorafast.bench.measure.timing import Mark, Step
from lorafast.methods.adapter import Adapter
from lorafast.methods.lamda import LaMDA
from lorafast.schedule import LaMDAFreeze

Batch = dict[str, torch.Tensor]

# AdamW's learning rates: the head's under every method, and the encoder's where all of it trains.
HEAD_LR = 1e-3
FULL_LR = 1e-4


@dataclass
class TrainTask:
    """A model with what trains it.

    module: what is called: the model or its compiled form.
    layers: every adapted layer by its path in the model.
    optimizers: the head's first, and the encoder's last if it has one of its own.
    trainable: elements and bytes that train at the start; a schedule may freeze some later.
    trains_at_start: for every parameter of the model, by name, whether it trains at the start.
    """

    impl: Impl
    method: str
    adapter: Adapter | None
    model: Classifier
    module: nn.Module
    layers: dict[str, nn.Module]
    optimizers: tuple[torch.optim.Optimizer, ...]
    schedule: recipes.Schedule | None
    trainable: tuple[int, int]
    trains_at_start: dict[str, bool]

    @property
    def trains_base(self) -> bool:
        """True if the encoder's own weights train."""
        return _trains_base(self.impl, self.adapter)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the cross entropy of a batch."""
        return _loss(self.module, batch)

    def step(self, batch: Batch, seed: int, losses: list[torch.Tensor] | None = None) -> Step:
        """Return a training step of three phases: forward, backward, optimizer.

        Its dropout masks depend on the seed alone, in whatever order tasks run.
        """
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
        """Return the share of examples whose most likely label is the right one."""
        self.model.eval()
        right = 0
        for batch in batches:
            logits = self.model(batch["input_ids"], batch["attention_mask"])
            right += (logits.argmax(-1) == batch["labels"]).sum().item()
        self.model.train()
        return right / sum(len(batch["labels"]) for batch in batches)

    def end_schedule(self) -> None:
        """Remove the schedule, and let train again exactly what trained at the start."""
        self.schedule = None
        for layer in self.layers.values():
            if isinstance(getattr(layer, "adapter", None), LaMDA):
                layer.freeze_columns(0)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.trains_at_start[name])
            if not self.trains_at_start[name]:
                parameter.grad = None

    def worst_error_ratio(self, batch: Batch, seed: int) -> tuple[float, str]:
        """Return the worst error ratio over the logits and each kind of gradient, and its name.

        A kind of gradient is that of one adapter parameter in all layers. The model is in training
        mode, with random adapter parameters.
        """
        R = self.adapter.r if self.adapter else 0
        return correctness.worst_ratio(
            self._error_ratio(batch, seed, count)
            for count in correctness.freezing_stages(self.impl, self.method, R)
        )

    def _error_ratio(self, batch: Batch, seed: int, frozen: int) -> tuple[float, str]:
        R = self.adapter.r if self.adapter else 0
        copied = copy.deepcopy(self.model)
        layers = {path: copied.get_submodule(path) for path in self.layers}
        if self.trains_base:
            copied.requires_grad_(True)  # a schedule may have frozen some of it
        randomize(layers, seed)
        # Ranks may differ by layer: every layer freezes the same share of its columns.
        share = frozen / R if frozen else 0.0
        columns = {
            path: round(share * adapter_parameters(layer)["lora_A"].shape[0])
            for path, layer in layers.items()
        }
        eager = {
            path: eager_linear(self.impl, self.method, self.adapter, layer, columns[path])
            for path, layer in layers.items()
        }
        trained = TRAINED[self.method] if self.adapter else frozenset()
        if self.adapter and frozen == R:
            trained -= {"lora_B"}
        truth, eager_found = (
            _logits_and_grads(
                with_eager_layers(copied, eager, trained, self.trains_base, float64), batch, seed
            )
            for float64 in (True, False)
        )
        for path, layer in layers.items():
            if frozen:
                layer.freeze_columns(columns[path])
            if not self.impl.uses_lorafast:
                peft_baseline.use_seeded_dropout(layer)
        if self.impl.compile:
            compiled.reset()
            copied = compiled.compile_module(copied, torch_random=True)
        found = _logits_and_grads(copied, batch, seed)
        floor = torch.finfo(next(self.model.encoder.parameters()).dtype).eps / 8
        # A name that only one side has is a parameter that does not train, or one that must not.
        ratios = {
            name: _ratio(found.get(name), eager_found.get(name), truth.get(name), floor)
            for name in truth | found
        }
        worst = max(ratios, key=ratios.get)
        return ratios[worst], correctness.stage_name(worst, frozen, R)


def _logits_and_grads(model: nn.Module, batch: Batch, seed: int) -> dict[str, torch.Tensor]:
    """Return the logits, and the gradients joined by kind.

    They are joined because the error ratio of a single number says nothing.
    """
    model.zero_grad()
    torch.manual_seed(seed)
    logits = model(batch["input_ids"], batch["attention_mask"])
    F.cross_entropy(logits, batch["labels"]).backward()
    grads: dict[str, list[torch.Tensor]] = {}
    # The names of a compiled model end like those of the model.
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kind = next((one for one in ARGUMENTS.values() if one in name), "other parameters")
            grads.setdefault(kind, []).append(parameter.grad.double().flatten())
    found = {"logits": logits.detach().double()}
    return found | {kind: torch.cat(parts) for kind, parts in grads.items()}


def _ratio(
    found: torch.Tensor | None, eager: torch.Tensor | None, truth: torch.Tensor | None, floor: float
) -> float:
    if found is None or truth is None or found.shape != truth.shape:
        return math.inf
    errors = ((found - truth).norm().item(), (eager - truth).norm().item())
    return testing.ratio(*errors, truth.norm().item(), floor)


def build(
    impl: Impl,
    method: str,
    adapter: Adapter | None,
    encoder: Encoder,
    seed: int,
    lr: float,
    total_steps: int,
    R: int = 16,
    batches: Sequence[Batch] = (),
    base_format: str = DENSE,
) -> TrainTask:
    """Return a task on a copy of the encoder.

    R: the rank for methods without an adapter.
    batches: for a method whose init reads gradients.
    base_format: how the encoder's linears hold their weights.
    Raises Unavailable.
    """
    if impl.base == "eager":
        raise Unavailable("missing", "the bench writes one layer by hand, and no whole model")
    if impl.built_by_peft:
        dtype = next(encoder.model.parameters()).dtype
        peft_baseline.check_available(impl, method, dtype)
    recipe = recipes.RECIPES[method] if impl.has_adapter else recipes.Recipe(lr)
    trains_base = _trains_base(impl, adapter)
    quantised_base.check_available(base_format, impl, trains_base, recipe.needs_gradients)
    model = _classifier(encoder, base_format, trains_base, seed)
    torch.manual_seed(seed)
    if impl.built_by_peft:
        model.encoder = peft_baseline.peft_model(model.encoder, impl, method, adapter, "all-linear")
        if not impl.uses_lorafast:  # which refuses layers with hooks, and needs none
            quantised_base.keep_scales(model.encoder)
    with _unsupported():
        if not impl.built_by_peft and impl.has_adapter and adapter is not None:
            _adapt(model, adapter, recipe, batches)
        model.train()
        layers = adapted_layers(model)
        if method in peft_baseline.METHOD_OPTIONS:
            init_A(layers, seed)
        optimizers = _optimizers(model, recipe, lr, R)
        schedule = _schedule(model, recipe, optimizers[-1], total_steps, impl.compile)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return TrainTask(
        impl,
        method,
        adapter,
        model,
        compiled.compile_module(model) if impl.compile else model,
        layers,
        optimizers,
        schedule,
        trainable=(sum(p.numel() for p in trained), sum(p.numel() * p.itemsize for p in trained)),
        trains_at_start={name: p.requires_grad for name, p in model.named_parameters()},
    )


def _trains_base(impl: Impl, adapter: Adapter | None) -> bool:
    return impl.base == "full" or (impl.has_adapter and adapter is None)


def _classifier(encoder: Encoder, base_format: str, trains_base: bool, seed: int) -> Classifier:
    base = copy.deepcopy(encoder.model)
    quantised_base.quantise(base, base_format)
    # The frozen model's backward passes through every layer only if its input requires a gradient.
    # All other models do the same, so that they are comparable.
    base.enable_input_require_grads()
    base.requires_grad_(trains_base)
    return Classifier(base, base.config.hidden_size, seed, next(base.parameters()).device)


def _adapt(
    model: Classifier, adapter: Adapter, recipe: recipes.Recipe, batches: Sequence[Batch]
) -> None:
    base, ranks = model.encoder, None
    if recipe.needs_gradients:
        adapter = recipes.with_gradient_init(
            adapter, base, batches, lambda _, batch: _loss(model, batch)
        )
    if recipe.spectral_ranks:
        ranks = recipes.spectral_ranks(base, adapter.r)
    lorafast.adapt(base, adapter, rank_pattern=ranks)


@contextlib.contextmanager
def _unsupported() -> Iterator[None]:
    """Turn a ValueError into Unavailable: a rank too large for a layer, too few steps."""
    try:
        yield
    except ValueError as error:
        raise Unavailable("unsupported", str(error)) from None


def _optimizers(
    model: Classifier, recipe: recipes.Recipe, lr: float, R: int
) -> tuple[torch.optim.Optimizer, ...]:
    groups = [{"params": list(model.head.parameters()), "lr": HEAD_LR}]
    if recipe.optimizer is not None:
        return torch.optim.AdamW(groups, weight_decay=0.0), recipe.optimizer(model.encoder, lr, R)
    trained = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    if trained:
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
        # Every new number of frozen columns compiles the model again, which takes half a minute.
        schedule.group = max(1, schedule.layers[0].r // 4)
    return schedule


def _loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the cross entropy of a batch."""
    return F.cross_entropy(module(batch["input_ids"], batch["attention_mask"]), batch["labels"])
