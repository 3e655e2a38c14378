"""One implementation of one method on a whole model: what trains, how a step goes, and whether its gradients are right."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import lorafast
from lorafast import testing
from lorafast.bench import compiled, peers, trust
from lorafast.bench.clock import Mark, Step
from lorafast.bench.contender import PARTS, form_of, parts_of
from lorafast.bench.encoder import Classifier, Encoder
from lorafast.bench.impl import Impl
from lorafast.bench.refusal import Unable
from lorafast.bench.textbook import TRAINS, EagerLinear, replaced
from lorafast.methods.adapter import Adapter
from lorafast.schedule.lamda import LaMDAFreeze

Batch = dict[str, torch.Tensor]

# Learning rates of AdamW: the head's under every method, the encoder's by what trains. LaMDA moves the largest singular directions
# of every weight, and full fine-tuning all of them.
HEAD_RATE = 1e-3
RATES = {"lora": 5e-4, "dora": 5e-4, "lamda": 3e-4, "none": 1e-4}


@dataclass
class Trainee:
    """layers: every adapted layer by its path in the model. `module` is what is called, the model or its compiled form."""

    impl: Impl
    method: str
    adapter: Adapter | None
    model: Classifier
    module: nn.Module
    layers: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    schedule: LaMDAFreeze | None
    trainable: tuple[int, int]  # elements and bytes at the start; LaMDA's shrink as it freezes columns

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross entropy of a batch."""
        return F.cross_entropy(self.module(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    def step(self, batch: Batch, seed: int, losses: list[torch.Tensor] | None = None) -> Step:
        """Forward, backward, optimizer, in three phases; its dropout masks follow from the seed, whoever went before."""

        def step(mark: Mark) -> None:
            self.optimizer.zero_grad()
            torch.manual_seed(seed)
            mark()
            loss = self.loss(batch)
            mark()
            loss.backward()
            mark()
            self.optimizer.step()
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
        right = sum((self.model(b["input_ids"], b["attention_mask"]).argmax(-1) == b["labels"]).sum().item() for b in batches)
        self.model.train()
        return right / sum(len(batch["labels"]) for batch in batches)

    def thaw(self) -> None:
        """As at the start of training: no schedule, and no column of lora_B frozen."""
        self.schedule = None
        if self.method == "lamda":
            for layer in self.layers.values():
                layer.freeze_columns(0)

    def error(self, batch: Batch, seed: int) -> tuple[float, str]:
        """The worst error ratio of the logits and of every kind of gradient over all layers, as in training, factors random."""
        R = self.adapter.r if self.adapter else 0
        return trust.worst(self._error(batch, seed, count) for count in trust.stages(self.impl, self.method, R))

    def _error(self, batch: Batch, seed: int, frozen: int) -> tuple[float, str]:
        copied = copy.deepcopy(self.model)
        layers = {path: copied.get_submodule(path) for path in self.layers}
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in layers.values():
                for part in parts_of(layer).values():
                    # Where B is 0, A has no gradient to be wrong about.
                    noise = torch.randn(part.shape, generator=generator) * 0.02
                    part.add_(noise.to(part.device, part.dtype))
        chained = {path: self._eager_linear(layer, frozen) for path, layer in layers.items()}
        trains = TRAINS[self.method] if self.impl.adapts else frozenset()
        trains -= {"lora_B"} if self.adapter and frozen == self.adapter.r else set()
        truth, eager = (
            _outcome(replaced(copied, chained, trains, self.impl.base == "full", wide), batch, seed) for wide in (True, False)
        )
        for layer in layers.values():
            if frozen:
                layer.freeze_columns(frozen)
            if not self.impl.ours:
                peers.mask(layer)
        if self.impl.compile:
            compiled.forget()
            copied = compiled.compiled(copied, torchs_draws=True)
        ours = _outcome(copied, batch, seed)
        floor = torch.finfo(next(self.model.encoder.parameters()).dtype).eps / 8
        # What is there on one side alone is a factor that does not train, or one that must not.
        ratios = {name: _ratio(ours.get(name), eager.get(name), truth.get(name), floor) for name in truth | ours}
        worst = max(ratios, key=ratios.get)
        return ratios[worst], trust.at_stage(worst, frozen, self.adapter.r if self.adapter else 0)

    def _eager_linear(self, layer: nn.Module, frozen: int) -> EagerLinear:
        parts = parts_of(layer)
        form = form_of(self.impl, self.method, self.adapter, parts)
        base = layer if isinstance(layer, lorafast.Linear) else layer.base_layer
        return EagerLinear(form, self.adapter.scaling, self.adapter.dropout, base, parts, frozen=frozen)


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
    return {"logits": logits.detach().double()} | {name: torch.cat(grads) for name, grads in found.items()}


def _ratio(ours: torch.Tensor | None, eager: torch.Tensor | None, truth: torch.Tensor | None, floor: float) -> float:
    if ours is None or truth is None or ours.shape != truth.shape:
        return math.inf
    return testing.ratio((ours - truth).norm().item(), (eager - truth).norm().item(), truth.norm().item(), floor)


def build(impl: Impl, method: str, adapter: Adapter | None, encoder: Encoder, seed: int, lr: float, total_steps: int) -> Trainee:
    """A trainee on a copy of the encoder. Trained A factors start alike for all that have them. Raises Unable."""
    if impl.base == "eager":
        raise Unable("missing", "the bench writes one layer by hand, and no whole model")
    base, dtype = copy.deepcopy(encoder.model), next(encoder.model.parameters()).dtype
    # The frozen model's backward goes through every layer only if its input asks for a gradient; all others are treated alike.
    base.enable_input_require_grads()
    base.requires_grad_(impl.base == "full")
    width, device = base.config.hidden_size, next(base.parameters()).device
    torch.manual_seed(seed)
    if impl.base == "lorafast":
        try:
            base = lorafast.adapt(base, adapter)
        except ValueError as error:  # a rank some shape has no room for
            raise Unable("unsupported", str(error)) from None
    elif impl.adapts:
        peers.check(impl, adapter, dtype)
        base = peers.model(base, impl, adapter, "all-linear")
    model = Classifier(base, width, seed, device).train()
    named = model.named_modules()
    layers = {path: module for path, module in named if isinstance(module, lorafast.Linear) or peers.is_layer(module)}
    groups = [{"params": list(model.head.parameters()), "lr": HEAD_RATE}]
    if trained := [parameter for parameter in base.parameters() if parameter.requires_grad]:
        groups.append({"params": trained, "lr": lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    everything = [parameter for group in groups for parameter in group["params"]]
    trainable = (sum(p.numel() for p in everything), sum(p.numel() * p.itemsize for p in everything))
    schedule = None
    if method == "lamda" and total_steps:
        # Every change of how many are frozen is compiled anew, a model in half a minute.
        schedule = LaMDAFreeze(model, total_steps, group=max(1, adapter.r // 4) if impl.compile else 1)
    module = compiled.compiled(model) if impl.compile else model
    trainee = Trainee(impl, method, adapter, model, module, layers, optimizer, schedule, trainable)
    _start_alike(trainee, seed)
    return trainee


@torch.no_grad()
def _start_alike(trainee: Trainee, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in trainee.layers.values():
        A = parts_of(layer)["lora_A"]
        if A.requires_grad:
            start = (torch.rand(A.shape, generator=generator) * 2 - 1) / A.shape[1] ** 0.5
            A.copy_(start)
