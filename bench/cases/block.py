"""lorafast-bench block: one block of a Llama, every implementation next to the frozen block."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

import lorafast
from lorafast import testing
from lorafast.bench.cases import implementations, peft_baseline, recipes
from lorafast.bench.cases.adapted_model import adapted_layers, eager_linear, init_A, randomize
from lorafast.bench.cases.candidate import adapter_parameters, route
from lorafast.bench.cases.expected_grads import TRAINED, EagerLinear, with_eager_layers
from lorafast.bench.cases.generate_task import use_exact_norms
from lorafast.bench.cases.implementations import Impl
from lorafast.bench.cases.rounds import Key, time_rows, training_step
from lorafast.bench.errors import Unavailable
from lorafast.bench.measure import memory
from lorafast.bench.measure.timing import Step
from lorafast.bench.report import fill_record
from lorafast.bench.report.progress import Progress
from lorafast.bench.report.record import Record
from lorafast.testing import SHORT

# Errors are taken over so many tokens.
_CHECKED_TOKENS = 64


class Size(NamedTuple):
    """The size of a block: its width, heads, and the width of its MLP."""

    hidden: int
    heads: int
    intermediate: int

    def __str__(self) -> str:
        return f"llama-block-{self.hidden}x{self.intermediate}"


class Plan(NamedTuple):
    """What to measure: every method by every implementation, at each dropout.

    tokens: the tokens of one text.
    """

    size: Size
    tokens: int
    impls: tuple[Impl, ...]
    methods: tuple[str, ...]
    dropouts: tuple[float, ...]
    R: int
    device: torch.device
    dtype: torch.dtype
    rounds: int
    seconds: float
    warmup: int
    seed: int

    @property
    def candidates(self) -> tuple[Key, ...]:
        """Implementation and method of every row at one dropout."""
        return implementations.candidates(self.impls, self.methods)


class Block(nn.Module):
    """A block of a Llama with random weights, with the positions of its tokens."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        config = LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_attention_heads=size.heads,
            num_key_value_heads=max(1, size.heads // 4),
        )
        config._attn_implementation = "sdpa"
        self.layer, self.rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output for x [1,M,hidden]."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return self.layer(x, position_embeddings=self.rotary(x, positions))


def run(plan: Plan, progress: Progress) -> Iterator[list[Record]]:
    """Yield the rows of one dropout after another."""
    torch.manual_seed(plan.seed)
    base = Block(plan.size).to(plan.device, plan.dtype).requires_grad_(False)
    for dropout in plan.dropouts:
        yield _Run(plan, base, dropout, progress).measure()


def progress_total(plan: Plan) -> int:
    """Return how often a run calls progress.begin."""
    return len(plan.dropouts) * (len(plan.candidates) + 1)


def build(impl: Impl, method: str, base: nn.Module, R: int, dropout: float, seed: int) -> nn.Module:
    """Return a copy of the base with adapters away from their start. Raises Unavailable."""
    model = copy.deepcopy(base)
    if not impl.has_adapter:
        return model
    adapter = recipes.spec(method, R, dropout)
    if impl.built_by_peft:
        peft_baseline.check_available(impl, method, next(base.parameters()).dtype)
        plain = Impl(impl.base.removesuffix("-mlp"))
        model = peft_baseline.peft_model(model, plain, method, adapter, "all-linear", None)
        if impl.fuses_mlp:
            lorafast.accelerate(model, fuse_mlp=True)
    else:
        try:
            lorafast.adapt(model, adapter, fuse_mlp=impl.fuses_mlp)
        except ValueError as error:  # a rank that is too large for a layer
            raise Unavailable("unsupported", str(error)) from None
    layers = adapted_layers(model)
    if method in peft_baseline.METHOD_OPTIONS:
        init_A(layers, seed)
    randomize(layers, seed)
    return model


class _Run:
    """All candidates at one dropout."""

    def __init__(self, plan: Plan, base: nn.Module, dropout: float, progress: Progress) -> None:
        self.plan, self.base, self.dropout, self.progress = plan, base, dropout, progress
        self.records = {key: self._record(*key) for key in plan.candidates}

    def measure(self) -> list[Record]:
        plan, blocks = self.plan, {}
        generator = torch.Generator(plan.device).manual_seed(plan.seed)
        shape = (1, plan.tokens, plan.size.hidden)
        x, dy = (
            torch.randn(shape, generator=generator, device=plan.device).to(plan.dtype)
            for _ in range(2)
        )
        for key, record in self.records.items():
            self.progress.begin(f"{plan.size} p={self.dropout:g}: {record.label}")
            try:
                self._check(key, x[:, :_CHECKED_TOKENS], dy[:, :_CHECKED_TOKENS])
                blocks[key] = self._examined(key, x, dy)
            except Exception as error:
                self._failed(key, error)
        self._time(blocks, x, dy)
        return list(self.records.values())

    def _record(self, impl: Impl, method: str) -> Record:
        plan = self.plan
        return Record(
            "block", str(impl), method, str(plan.device), SHORT[plan.dtype], plan.seed, plan.tokens,
            plan.R, self.dropout, model=str(plan.size), batch_size=1, seq=plan.tokens,
        )  # fmt: skip

    def _check(self, key: Key, x: torch.Tensor, dy: torch.Tensor) -> None:
        """Enter the error of the output and of every kind of gradient on a few tokens."""
        (impl, method), plan, record = key, self.plan, self.records[key]
        # The mask of a peer is its own, so that it is checked without one.
        dropout = self.dropout if impl.uses_lorafast else 0.0
        block = build(impl, method, self.base, plan.R, dropout, plan.seed)
        layers = adapted_layers(block)
        adapter = recipes.spec(method, plan.R, dropout) if impl.has_adapter else None
        eager = {path: eager_linear(impl, method, adapter, one) for path, one in layers.items()}
        trained = TRAINED[method] if impl.has_adapter else frozenset()
        truth, chain = (
            with_eager_layers(block, eager, trained, False, float64) for float64 in (True, False)
        )
        use_exact_norms(truth)
        first = next(iter(layers.values()), None)
        if first is not None:
            record.adapter_dtype = SHORT[adapter_parameters(first)["lora_A"].dtype]
            record.route = route(first, plan.tokens) if impl.uses_lorafast else "torch"
        lorafast.ungroup(truth)
        lorafast.ungroup(chain)
        expected = self._step(truth, trained, x.double(), dy.double())
        found, eager_found = (self._step(one, trained, x, dy) for one in (block, chain))
        floor = torch.finfo(plan.dtype).eps / 8
        ratios = {
            name: testing.ratio(
                (found[name] - value).norm().item(),
                (eager_found[name] - value).norm().item(),
                value.norm().item(),
                floor,
            )
            for name, value in expected.items()
        }
        name = max(ratios, key=ratios.get)
        fill_record.set_error_ratio(record, ratios[name], name, x.shape[1])

    def _step(
        self, block: nn.Module, trained: frozenset[str], x: torch.Tensor, dy: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """y, dx, and all gradients of each kind as one vector, in float64."""
        x = x.detach().requires_grad_()
        torch.manual_seed(self.plan.seed)
        y = block(x)
        y.backward(dy)
        found = {"y": y.detach().double(), "x": x.grad.double()}
        layers = [adapter_parameters(module) for module in _adapted(block)]
        for name in sorted(trained):
            found[name] = torch.cat([layer[name].grad.double().flatten() for layer in layers])
        return found

    def _examined(self, key: Key, x: torch.Tensor, dy: torch.Tensor) -> nn.Module:
        """A block on all tokens, its bytes entered."""
        record, device = self.records[key], self.plan.device
        block = build(*key, self.base, self.plan.R, self.dropout, self.plan.seed)
        x = x.detach().requires_grad_()
        step = self._timed_step(block, x, dy)
        step(lambda: None)
        _clear_grads(block)
        constant = [*block.parameters(), *block.buffers()]
        saved = testing.saved(lambda: block(x), {"x": x}, constant)
        record.saved_bytes = saved.own
        record.activation_bytes = memory.measure(lambda: block(x), device).held
        record.peak_bytes = memory.measure(lambda: step(lambda: None), device).peak
        _clear_grads(block)
        return block

    def _time(self, blocks: dict[Key, nn.Module], x: torch.Tensor, dy: torch.Tensor) -> None:
        plan = self.plan
        self.progress.begin(f"{plan.size} p={self.dropout:g}: rounds")
        steps = {
            key: self._timed_step(block, x.detach().requires_grad_(), dy)
            for key, block in blocks.items()
            if self.records[key].ok
        }
        time_rows(self.records, steps, plan, plan.device, self._failed, self.progress)

    @staticmethod
    def _timed_step(block: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Step:
        return training_step(block, x, dy, lambda: _clear_grads(block))

    def _failed(self, key: Key, error: Exception) -> None:
        fill_record.set_failure(self.records[key], error, key[0])
        fill_record.free_memory(self.plan.device)


def _adapted(block: nn.Module) -> list[nn.Module]:
    """The adapted layers, or their eager stand-ins."""
    eager = [module for module in block.modules() if isinstance(module, EagerLinear)]
    return eager or list(adapted_layers(block).values())


def _clear_grads(block: nn.Module) -> None:
    for parameter in block.parameters():
        parameter.grad = None
