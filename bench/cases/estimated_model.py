"""A transformers model made from a config, adapted, and stepped: on meta tensors or really."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

import lorafast
from lorafast.bench.cases import peft_baseline, recipes
from lorafast.bench.cases.implementations import Impl
from lorafast.bench.cases.model_presets import Preset
from lorafast.bench.errors import BenchError, Unavailable
from lorafast.methods.adapter import Adapter
from lorafast.methods.lamda import LaMDA

# The ranks of VeRA, whose trained vectors need many more than factors do: its papers' and PEFT's.
VERA_R = 256
# The methods that PEFT has a config for, LoRA-FA as a LoRA whose A is frozen.
_PEFT_METHODS = ("lora", "rslora", "dora", "lora-fa", "vera", "adalora")


# Where transformers' classifiers have their head.
_HEADS = ("classifier", "score")


@dataclass
class Batch:
    """The sizes of a batch: texts of seq tokens, and of target tokens for a decoder."""

    size: int
    seq: int
    target: int

    def arguments(self, task: str, device: torch.device) -> dict[str, torch.Tensor]:
        """Return what the model is called with: token 1 everywhere, and labels."""

        def ones(*shape: int) -> torch.Tensor:
            return torch.ones(shape, dtype=torch.int64, device=device)

        tokens = ones(self.size, self.seq)
        labels = {
            "causal": lambda: ones(self.size, self.seq),
            "seq2seq": lambda: ones(self.size, self.target),
            "classifier": lambda: ones(self.size),
        }[task]()
        return {"input_ids": tokens, "labels": labels}


class EstimatedModel:
    """A model with its optimizer.

    Attributes:
        model: what transformers, PEFT or lorafast made.
        trained: the parameters that train.
        optimizer: AdamW over them; None without any.
    """

    def __init__(self, model: nn.Module, task: str, foreach: bool) -> None:
        self.model, self.task = model, task
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.device = next(model.parameters()).device
        self.optimizer = None
        if self.trained:
            # torch takes foreach by itself on a GPU, but not on meta tensors, which stand for it.
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, foreach=foreach)

    def held(self) -> Iterator[torch.Tensor]:
        """Yield the weights and the optimizer's state, which are there before a step begins."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from self.state()

    def state(self) -> Iterator[torch.Tensor]:
        """Yield the tensors of the optimizer's state."""
        for state in self.optimizer.state.values() if self.optimizer else ():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def set_checkpointing(self, on: bool) -> None:
        """Let every block keep its input alone and compute the rest again, or keep everything."""
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        # transformers 5.24 has a new name for it.
        new = hasattr(base, "activation_checkpointing_enable")
        name = f"{'activation' if new else 'gradient'}_checkpointing"
        if on:
            getattr(base, f"{name}_enable")({"use_reentrant": False})
        else:
            getattr(base, f"{name}_disable")()

    def step(
        self,
        arguments: dict[str, torch.Tensor],
        after_forward: Callable[[], None] = lambda: None,
        after_backward: Callable[[], None] = lambda: None,
    ) -> None:
        """Take a training step from gradients that are None."""
        loss = self.model(**arguments).loss
        after_forward()
        loss.backward()
        after_backward()
        del loss
        if self.optimizer is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of LaMDA without a schedule
                self.optimizer.step()
            self.optimizer.zero_grad()
        else:
            self.model.zero_grad()


def base_model(preset: Preset, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return a model for training, from its config, with random weights or on the meta device.

    Raises BenchError if transformers does not make a model of the config.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    config = dict(preset.config)
    kind = config.pop("model_type")
    if preset.targets and dtype != torch.bfloat16:
        raise BenchError("the grouped product of a mixture's experts is torch's for bf16 alone")
    makers = {
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "classifier": transformers.AutoModelForSequenceClassification,
    }
    try:
        made = transformers.AutoConfig.for_model(kind, **config)
        made.use_cache = False
        if hasattr(made, "num_experts"):
            # The loop over experts that have tokens needs values; the grouped product does not.
            made._experts_implementation = "grouped_mm"
        with device:
            model = makers[preset.task].from_config(made, dtype=dtype)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BenchError(f"transformers makes no model of the config: {error}") from error
    return model.to(dtype).train()


def build(
    preset: Preset,
    impl: Impl,
    method: str,
    R: int,
    dropout: float,
    dtype: torch.dtype,
    device: torch.device,
    on_gpu: bool,
) -> EstimatedModel:
    """Return an implementation of a method on a preset.

    Raises Unavailable where there is none, and BenchError for a config that makes no model.
    """
    model = base_model(preset, dtype, device)
    if impl.base == "full":
        return EstimatedModel(model, preset.task, on_gpu)
    model.requires_grad_(False)
    if not impl.has_adapter:
        model.enable_input_require_grads()
        return EstimatedModel(model, preset.task, on_gpu)
    adapter = _spec(method, R, dropout)
    targets = _targets(model, preset)
    with device:
        if impl.built_by_peft:
            _check_peft(impl, method, dtype)
            model = _peft_model(model, targets, impl, method, adapter, dtype)
        else:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # a head that does not train
                    model = lorafast.adapt(model, adapter, target_modules=targets)
            except ValueError as error:  # a rank that is too large for a layer
                raise Unavailable("unsupported", str(error)) from None
    return EstimatedModel(model.train(), preset.task, on_gpu)


def _targets(model: nn.Module, preset: Preset) -> list[str]:
    """Return the names of the layers that get adapters: the same ones for PEFT and lorafast."""
    if preset.targets:
        return list(preset.targets)
    return [name for name, _ in _frozen_linears(model)]


def _frozen_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linears but the head's, which makes logits, by name."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and module is not output and not name.startswith(_HEADS):
            yield name, module


def _spec(method: str, R: int, dropout: float) -> Adapter:
    adapter = recipes.spec(method, VERA_R if method == "vera" else R, dropout)
    if adapter is None:
        raise Unavailable("missing", f"{method} trains the weights themselves: see full")
    if isinstance(adapter, LaMDA):
        # The start that changes no weight takes as many bytes, and needs no values.
        return replace(adapter, init="zero")
    return adapter


def _check_peft(impl: Impl, method: str, dtype: torch.dtype) -> None:
    name = "lora" if method in ("lora-fa", "vera", "adalora") else method
    peft_baseline.check_available(impl, name, dtype)
    if method not in _PEFT_METHODS:
        raise Unavailable("missing", f"the bench does not build PEFT's {method}")


def _peft_model(
    model: nn.Module,
    targets: list[str],
    impl: Impl,
    method: str,
    adapter: Adapter,
    dtype: torch.dtype,
) -> nn.Module:
    from peft import AdaLoraConfig, VeraConfig, get_peft_model

    if method == "vera":
        config = VeraConfig(
            r=adapter.r, vera_dropout=adapter.dropout, target_modules=targets, d_initial=0.1
        )
    elif method == "adalora":
        config = AdaLoraConfig(
            init_r=adapter.r,
            target_r=adapter.target_r,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=targets,
            total_step=1000,
        )
    else:
        name = "lora" if method == "lora-fa" else method
        config = peft_baseline.peft_config(name, adapter, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(model, config, autocast_adapter_dtype=impl.base != "peft-bf16")
    for name, parameter in made.named_parameters():
        if method == "lora-fa" and ".lora_A." in name:
            parameter.requires_grad_(False)
        # On a device, but not on meta tensors, PEFT casts new adapters to the base's dtype.
        rank = name.endswith(".ranknum.default")
        if impl.base == "peft-bf16" and (rank or ".lora_" in name or ".vera_" in name):
            parameter.data = parameter.data.to(dtype)
        if rank:
            # And a Parameter that is cast there trains from then on.
            parameter.requires_grad_(dtype.itemsize == 2)
    return made


def linear_weight_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of the frozen linears' weights, which a quantised base compresses.

    The keys: "dense", "nf4", "fp8", and "largest", the largest dense weight. NF4 has 4 bits an
    element, one byte of scale for 64 elements and four for 64 · 256 (double quantisation); FP8 one
    byte an element and four for a row. The head that makes logits stays dense, as bitsandbytes
    leaves it, and so do the fused experts of a mixture, which no such library takes.
    """
    dense = nf4 = fp8 = largest = 0
    for _, module in _frozen_linears(model):
        weight = module.weight
        count, size = weight.numel(), weight.numel() * weight.itemsize
        dense, largest = dense + size, max(largest, size)
        nf4 += count // 2 + -(-count // 64) + 4 * -(-count // (64 * 256))
        fp8 += count + 4 * weight.shape[0]
    return {"dense": dense, "nf4": nf4, "fp8": fp8, "largest": largest}
