"""Merge an adapter into the weights, and export it as plain LoRA.

    python examples/merge_and_export.py

A DoRA is trained for a few steps, saved in PEFT's format, exported as plain LoRA for engines that
take nothing else, and merged. Needs nothing beyond lorafast, and runs on a CPU in a few seconds.
"""

import copy
import tempfile
from pathlib import Path

import torch

import lorafast


def trained_model(base):
    """The base with a DoRA that has learned something."""
    model = lorafast.adapt(base, lorafast.DoRA(r=8, alpha=16), seed=0)
    optimizer = torch.optim.AdamW(lorafast.adapter_parameters(model), lr=1e-2)
    for _ in range(30):
        x = torch.randn(64, 32)
        (model(x) - x.roll(1, dims=1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def difference(model, other):
    """The largest difference of two models' outputs."""
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (model(x) - other(x)).abs().max().item()


def main():
    """Save, export at two ranks, and merge."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    model = trained_model(copy.deepcopy(base))
    print(f"the adapter changes outputs by up to {difference(model, base):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        lorafast.save_adapter(model, Path(folder) / "dora")
        loaded = lorafast.load_adapter(copy.deepcopy(base), Path(folder) / "dora").eval()
        print(f"DoRA from its file: off by {difference(loaded, model):.1e}")

        for rank in (8, 24):
            exported = Path(folder) / f"lora{rank}"
            lorafast.save_adapter(model, exported, as_lora=True, rank=rank)
            loaded = lorafast.load_adapter(copy.deepcopy(base), exported).eval()
            print(f"plain LoRA of rank {rank}: off by {difference(loaded, model):.1e}")

    adapted = copy.deepcopy(model)
    merged = lorafast.merge(model)
    kinds = [type(module).__name__ for module in merged]
    print(f"merged into {kinds}: off by {difference(merged, adapted):.1e}")


if __name__ == "__main__":
    main()
