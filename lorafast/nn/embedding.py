"""lorafast.Embedding: torch.nn.Embedding with an adapter, its table frozen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lorafast.engine import weight_norm
from lorafast.engine.problem import LayerTensors
from lorafast.methods.adapter import Adapter
from lorafast.nn.adapter_layer import AdapterLayer


class Embedding(AdapterLayer, nn.Embedding):
    """y = gain⊙(W[ids] + s·core(Aᵀ[ids]) Bᵀ): the linear layer of one-hot rows, K = num_embeddings, N = embedding_dim.

    weight [K,N], lora_A [R,K], lora_B [N,R], and by method lora_core, lora_magnitude [N] (axis="in": [K]); ids of any shape give
    [...,N] in the weight's dtype. Where B would start at 0 and A trains, A does and B is N(0,1), as in PEFT (a row of A sees its
    own id's gradient alone). dropout has no effect, as in PEFT. Plain autograd; M·R is kept. The rest is as lorafast.Linear's.
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
        self._attach(adapter, adapter_dtype)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        adapter: Adapter | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> Embedding:
        """The embedding's own weight Parameter, frozen, with an adapter. A subclass with a forward of its own is refused."""
        if why := why_not_plain(embedding):
            raise TypeError(
                f"embedding must be a plain torch.nn.Embedding without an adapter; this one {why}"
            )
        return cls._from(embedding, adapter, adapter_dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self._merged is not None or self.disabled:
            y = self._rows(ids, self.weight)
            return y if self._away is None else y + self._low(ids, *self._start_away())
        y = self._rows(ids, self.weight) + self._low(ids, self._tensors(), self.scaling)
        if self.lora_magnitude is None:
            return y
        gain = weight_norm.gain(self.lora_magnitude, self._norm())
        return y * (gain if self.adapter.axis == "out" else gain[ids, None]).to(y.dtype)

    def _rows(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def _low(
        self, ids: torch.Tensor, t: LayerTensors, scaling: float | torch.Tensor
    ) -> torch.Tensor:
        """s·core(Aᵀ[ids]) Bᵀ in the weight's dtype; as everywhere, s costs no rounding."""
        h = self._rows(ids, t.lora_A.t()).to(self.weight.dtype)
        if t.core is not None:
            core = t.core.to(h.dtype)
            h = h * core if core.dim() == 1 else F.linear(h, core)
        return F.linear(h, (t.lora_B * scaling).to(h.dtype)).to(h.dtype)

    def _start_away(self) -> tuple[LayerTensors, float | torch.Tensor]:
        factors, settings = self._away
        return factors, settings.scaling if factors.scale is None else factors.scale

    def _attach(
        self, adapter: Adapter | None, adapter_dtype: torch.dtype | None, start: bool = True
    ) -> None:
        if isinstance(adapter, Adapter) and not adapter.embeds:
            raise TypeError(
                f"{adapter} is made for linears; weight {tuple(self.weight.shape)} is a table of embeddings"
            )
        if getattr(adapter, "lora_bias", False):
            raise ValueError(
                f"{adapter}: lora_bias belongs to linears; weight {tuple(self.weight.shape)} is a table of embeddings"
            )
        super()._attach(adapter, adapter_dtype, start)

    def _started(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        values = super()._started(weight)
        if self.lora_A.requires_grad and not values["lora_B"].any():
            values |= {
                "lora_A": torch.zeros_like(values["lora_A"]),
                "lora_B": torch.randn_like(values["lora_B"]),
            }
        return values

    def _adopt(self, base: nn.Embedding) -> None:
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
    """Why a lorafast.Embedding cannot take this module's place, or None."""
    kind = f"{type(embedding).__module__}.{type(embedding).__qualname__}"
    if not isinstance(embedding, nn.Embedding) or isinstance(embedding, AdapterLayer):
        return f"is a {kind}"
    if type(embedding).forward is not nn.Embedding.forward:
        return f"is a {kind}, an embedding with a forward of its own"
    if embedding.max_norm is not None:
        return f"is an embedding with max_norm={embedding.max_norm}, which would rewrite the frozen table"
    return (
        None
        if isinstance(embedding.weight, nn.Parameter)
        else f"is a {kind} whose weight is no Parameter"
    )
