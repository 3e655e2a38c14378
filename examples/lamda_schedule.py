"""Train with LaMDA, whose B freezes column by column until only the small core trains.

    python examples/lamda_schedule.py

Prints how many columns are frozen and how many numbers still train. Needs nothing beyond lorafast,
and runs on a CPU in a few seconds.
"""

import torch

import lorafast

STEPS, RANK = 100, 16


def main():
    """Train a small model towards another one and watch the schedule."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    teacher = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)
    )
    lorafast.adapt(model, lorafast.LaMDA(r=RANK))
    optimizer = torch.optim.AdamW(lorafast.adapter_parameters(model), lr=1e-2)
    schedule = lorafast.schedule.LaMDAFreeze(model, total_steps=STEPS, fraction=0.3)

    for step in range(STEPS):
        x = torch.randn(64, 64)
        with torch.no_grad():
            target = teacher(x)
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()  # after optimizer.step(), before zero_grad()
        optimizer.zero_grad()
        if step % 10 == 0 or step == STEPS - 1:
            frozen = f"{model[0].frozen_columns:2} of {RANK} columns frozen"
            print(f"step {step:3}: loss {loss.item():.4f}, {frozen}, {live(model):,} numbers train")

    print(lorafast.explain(model))


def live(model):
    """How many numbers still change: frozen columns of B do not."""
    layers = [layer for layer in model if isinstance(layer, lorafast.Linear)]
    columns = sum((layer.r - layer.frozen_columns) * layer.out_features for layer in layers)
    return columns + sum(layer.core.numel() for layer in layers)


if __name__ == "__main__":
    main()
