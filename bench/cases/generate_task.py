"""A small Llama that generates text by one implementation, and the error of its logits."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

import lorafast
from lorafast import testing
from lorafast.bench.cases import peft_baseline
from lorafast.bench.cases.adapted_model import (
    adapted_layers,
    eager_linear,
    init_A,
    randomize,
)
from lorafast.bench.cases.candidate import adapter_parameters, route
from lorafast.bench.cases.expected_grads import with_eager_layers
from lorafast.bench.cases.implementations import Impl
from lorafast.bench.errors import Unavailable
from lorafast.methods.adapter import Adapter
from lorafast.testing import SHORT

VOCABULARY = 1024
HEAD_SIZE = 64


class Size(NamedTuple):
    """The size of a Llama."""

    layers: int
    hidden: int

    def __str__(self) -> str:
        return f"llama-{self.layers}x{self.hidden}"


def llama(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> nn.Module:
    """Return a Llama for text generation with random weights: nothing is downloaded."""
    import transformers

    transformers.logging.set_verbosity_error()
    heads = max(1, size.hidden // HEAD_SIZE)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=max(1, 8 * size.hidden // 3 // HEAD_SIZE) * HEAD_SIZE,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        # Large enough for the layers, and not the embeddings alone, to decide the next token.
        initializer_range=size.hidden**-0.5,
        # Without an end of text every call makes as many tokens as it is asked for.
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).to(device, dtype).eval().requires_grad_(False)


@dataclass
class GenerateTask:
    """A model that generates text greedily.

    truth, chain: the same model as stock torch ops, in float64 and in the model's dtype.
    """

    model: nn.Module
    truth: nn.Module
    chain: nn.Module
    adapter_dtype: str | None
    route: str

    def generate(self, prompt: torch.Tensor, tokens: int, **more: object) -> object:
        """Return what generate() returns for a prompt [1,S] and so many new tokens."""
        return self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            **more,
        )

    @torch.no_grad()
    def error_ratio(self, prompt: torch.Tensor, tokens: int) -> float:
        """Return the error ratio of the logits of every new token, given the tokens before it.

        The task's logits come from its decoding steps; those of truth and chain from one forward
        over the text that the task has made.
        """
        made = self.generate(prompt, tokens, return_dict_in_generate=True, output_logits=True)
        found = torch.cat(made.logits).double()
        expected, eager = (
            model(made.sequences[:, :-1]).logits[0, prompt.shape[1] - 1 :].double()
            for model in (self.truth, self.chain)
        )
        floor = torch.finfo(next(self.model.parameters()).dtype).eps / 8
        errors = ((found - expected).norm().item(), (eager - expected).norm().item())
        return testing.ratio(*errors, expected.norm().item(), floor)

    def forget_references(self) -> None:
        """Drop truth and chain, whose memory the timed models need."""
        self.truth = self.chain = None


def build(
    impl: Impl, method: str, adapter: Adapter | None, base: nn.Module, seed: int
) -> GenerateTask:
    """Return a task on a copy of the base model, its adapters away from their start.

    Raises Unavailable.
    """
    model = copy.deepcopy(base)
    if impl.built_by_peft:
        peft_baseline.check_available(impl, method, next(base.parameters()).dtype)
        model = peft_baseline.peft_model(model, impl, method, adapter, "all-linear", "CAUSAL_LM")
    elif impl.has_adapter:
        try:
            model = lorafast.adapt(model, adapter)
        except ValueError as error:  # a rank that is too large for a layer
            raise Unavailable("unsupported", str(error)) from None
    model.eval()
    layers = adapted_layers(model)
    if method in peft_baseline.METHOD_OPTIONS:
        init_A(layers, seed)
    randomize(layers, seed)
    eager = {path: eager_linear(impl, method, adapter, layer) for path, layer in layers.items()}
    truth, chain = (
        with_eager_layers(model, eager, frozenset(), False, float64).eval()
        for float64 in (True, False)
    )
    use_exact_norms(truth)
    first = next(iter(layers.values()), None)
    dtype = None if first is None else SHORT[adapter_parameters(first)["lora_A"].dtype]
    path = route(first, 1) if impl.uses_lorafast else "torch"
    if impl.base == "merged":
        model = lorafast.merge(model)
    return GenerateTask(model, truth, chain, dtype, path)


def use_exact_norms(model: nn.Module) -> None:
    """Replace the norms of a float64 model: those of transformers compute in fp32."""
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            exact = nn.RMSNorm(module.weight.shape, module.variance_epsilon)
            exact.weight = module.weight
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, exact)
