"""lorafast.Embedding: torch.nn.Embedding with an adapter, its table frozen."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorafast.engine.formula import gain_of
from lorafast.engine.problem import LayerTensors
from lorafast.methods.adapter import Adapter
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.size_warnings import warn_about_layer


class Embedding(AdapterLayer, nn.Embedding):
    """torch.nn.Embedding with an adapter: y = gain⊙(W[ids] + s·core(Aᵀ[ids]) Bᵀ).

    It is the linear layer of one-hot rows, with K = num_embeddings and N = embedding_dim:
    weight [K,N], frozen; lora_A [R,K], lora_B [N,R], and by method lora_core, lora_magnitude [N]
    (axis="in": [K]). ids of any shape give y [...,N] in the weight's dtype. Where B would start at
    0 and A trains, A starts at 0 and B as N(0,1), as in PEFT, because a column of A gets a gradient
    from its own id alone. dropout has no effect, as in PEFT. It runs on plain autograd, which keeps
    M·R values. The rest is as in lorafast.Linear.

    Args:
        num_embeddings: K.
        embedding_dim: N.
        padding_idx: as in torch.nn.Embedding.
        adapter: the adapter, such as lorafast.LoRA(r=16); None is lorafast.LoRA().
        device: device of all tensors.
        dtype: dtype of the table.
        adapter_dtype: dtype of the adapter's tensors, as in lorafast.Linear.

    Raises:
        TypeError: adapter is no adapter, or is made for linears only.
        ValueError: the adapter has a lora_bias.

    Example:
        table = lorafast.Embedding(100, 16, adapter=lorafast.LoRA(r=4))
        y = table(torch.tensor([[1, 2], [3, 4]]))

    Source:
        arXiv:2106.09685
    """

    bias = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        adapter: Adapter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Embedding.__init__(
            self, num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype
        )
        warn_about_layer(type(self), adapter, embedding_dim, num_embeddings)
        self._attach(adapter, adapter_dtype)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        adapter: Adapter | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> Embedding:
        """Return a layer on the embedding's own weight Parameter, frozen, with an adapter.

        Args:
            embedding: a plain torch.nn.Embedding.
            adapter: the adapter; None is lorafast.LoRA().
            adapter_dtype: dtype of the adapter's tensors.

        Returns:
            The layer.

        Raises:
            TypeError: embedding has a forward of its own, a max_norm, or a parametrized weight.

        Example:
            table = lorafast.Embedding.from_embedding(torch.nn.Embedding(100, 16))
        """
        if why := why_not_plain(embedding):
            raise TypeError(
                f"embedding must be a plain torch.nn.Embedding without an adapter; this one {why}"
            )
        # First, so that a warning that is an error leaves the embedding as it was.
        warn_about_layer(cls, adapter, embedding.embedding_dim, embedding.num_embeddings)
        return cls._from(embedding, adapter, adapter_dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return y [...,N] for input, the ids [...]."""
        ids = input
        y = self._lookup(ids, self.weight)
        if self._merged is not None or self.disabled:
            if self._removed_delta is None:
                return y
            factors, options = self._removed_delta
            scaling = options.scaling if factors.scale is None else factors.scale
            return y + self._delta(ids, factors, scaling)
        tensors = self._tensors()
        if self.freezing:
            tensors = tensors._replace(lora_B=self._masked(tensors.lora_B))
        y = y + self._delta(ids, tensors, self.scaling)
        if self.lora_magnitude is None:
            return y
        gain = gain_of(self.lora_magnitude, self._norm())
        return y * (gain if self.adapter.axis == "out" else gain[ids, None]).to(y.dtype)

    def _lookup(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def _delta(
        self, ids: torch.Tensor, tensors: LayerTensors, scaling: float | torch.Tensor
    ) -> torch.Tensor:
        """Return s·core(Aᵀ[ids]) Bᵀ in the weight's dtype; s costs no rounding of its own."""
        h = self._lookup(ids, tensors.lora_A.t()).to(self.weight.dtype)
        if tensors.core is not None:
            core = tensors.core.to(h.dtype)
            h = h * core if core.dim() == 1 else F.linear(h, core)
        return F.linear(h, (tensors.lora_B * scaling).to(h.dtype)).to(h.dtype)

    def _attach(
        self, adapter: Adapter | None, adapter_dtype: torch.dtype | None, start: bool = True
    ) -> None:
        shape = tuple(self.weight.shape)
        if isinstance(adapter, Adapter) and not adapter.supports_embedding:
            raise TypeError(
                f"{adapter} is made for linears; weight {shape} is a table of embeddings"
            )
        if getattr(adapter, "lora_bias", False):
            raise ValueError(
                f"{adapter}: lora_bias belongs to linears; weight {shape} is a table of embeddings"
            )
        super()._attach(adapter, adapter_dtype, start)

    def _initial_values(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        values = super()._initial_values(weight)
        if self.lora_A.requires_grad and not values["lora_B"].any():
            values["lora_A"] = torch.zeros_like(values["lora_A"])
            values["lora_B"] = torch.randn_like(values["lora_B"])
        return values

    def _adopt(self, base: Any) -> None:
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "scale_grad_by_freq"):
            setattr(self, name, getattr(base, name))
        self.max_norm, self.norm_type, self.sparse = None, base.norm_type, False
        self.weight = base.weight

    def _W(self) -> torch.Tensor:
        return self.weight.t()

    def _new_base(self) -> nn.Embedding:
        return nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"
        )


def why_not_plain(embedding: nn.Module) -> str | None:
    """Return why a lorafast.Embedding cannot replace this module, or None."""
    kind = f"{type(embedding).__module__}.{type(embedding).__qualname__}"
    if not isinstance(embedding, nn.Embedding) or isinstance(embedding, AdapterLayer):
        return f"is a {kind}"
    if type(embedding).forward is not nn.Embedding.forward:
        return f"is a {kind}, an embedding with a forward of its own"
    if embedding.max_norm is not None:
        norm = embedding.max_norm
        return f"is an embedding with max_norm={norm}, which would rewrite the frozen table"
    return (
        None
        if isinstance(embedding.weight, nn.Parameter)
        else f"is a {kind} whose weight is no Parameter"
    )
