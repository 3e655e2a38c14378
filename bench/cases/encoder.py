"""A pretrained encoder that comes with a package, and a classifier on it: nothing is downloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from lorafast.bench.cases.choices import ENCODERS
from lorafast.bench.cases.corpus import LABELS, Example
from lorafast.bench.errors import BenchError
from lorafast.runtime import extras


def folder(name: str) -> Path:
    """Return the folder of the weights. BenchError, naming the package, if it is not installed."""
    found = importlib.util.find_spec(ENCODERS[name])
    if found is None or not found.submodule_search_locations:
        package = ENCODERS[name].replace("_", "-")
        raise BenchError(
            f"the weights of {name} come with the package {package}: "
            f"{extras.how_to_install('bench')}"
        )
    return Path(found.submodule_search_locations[0]) / "model"


class Encoder:
    """A pretrained encoder and its tokenizer."""

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        where = folder(name)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(where)
        # No dropout but the adapter's, so that two steps on the same batch are the same.
        self.model = transformers.AutoModel.from_pretrained(
            where,
            add_pooling_layer=False,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            dtype=dtype,
        ).to(device)
        self._device = device

    def batch(self, examples: list[Example], seq: int) -> dict[str, torch.Tensor]:
        """Return input_ids and attention_mask [B, seq], cut or padded to seq, and labels [B]."""
        texts = [example.text for example in examples]
        tokens = self._tokenizer(
            texts, truncation=True, padding="max_length", max_length=seq, return_tensors="pt"
        )
        labels = torch.tensor([example.label for example in examples])
        return {
            "input_ids": tokens["input_ids"].to(self._device),
            "attention_mask": tokens["attention_mask"].to(self._device),
            "labels": labels.to(self._device),
        }


class Classifier(nn.Module):
    """A linear classifier on the mean over tokens of the encoder's output, in fp32.

    The linear layer, called the head, trains under every method.
    """

    def __init__(self, encoder: nn.Module, width: int, seed: int, device: torch.device) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, len(LABELS), device=device)
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(self.head.weight.shape, generator=generator) / width**0.5
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.zero_()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, labels]."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        hidden = output.last_hidden_state.to(self.head.weight.dtype)
        mask = attention_mask[..., None]
        return self.head((hidden * mask).sum(1) / mask.sum(1))
