"""Models for the tests of lorafast.merged, and the comparison of all their bits."""

import peft
import torch
from torch import nn

from helpers import peft_models, tiny_transformers
from lorafast import DoRA

IDS = torch.arange(6).reshape(2, 3)


def bits(model):
    """Every bit of every tensor of a model, and where its Parameters are."""
    tensors = [*model.parameters(), *model.buffers()]
    values = [t.detach().reshape(-1).view(torch.uint8).clone() for t in tensors]
    return values, [(id(p), p.data_ptr()) for p in model.parameters()]


def assert_unchanged(model, before):
    values, places = bits(model)
    assert places == before[1]
    assert all(map(torch.equal, values, before[0]))


class Embedder(nn.Module):
    """An embedding and a linear."""

    def __init__(self):
        super().__init__()
        self.table, self.up = nn.Embedding(9, 8), nn.Linear(8, 6)

    def forward(self, ids):
        return self.up(self.table(ids))


class Tied(nn.Module):
    """An embedding and a head on one tensor."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


def on_peft(base, dtype=torch.float32, **fields):
    """A PeftModel on a base, its adapters away from their start, in eval."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base.to(dtype), peft_models.config(**fields))
    peft_models.perturb(model)
    return model.eval()


def models():
    """An adapted model and a PeftModel, and an input of both."""
    adapted = tiny_transformers.adapted(tiny_transformers.llama(), DoRA(r=4))
    theirs = tiny_transformers.peft_adapted(
        tiny_transformers.llama(), peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    )
    return [adapted, theirs]
