"""Fine-tune a model with LoRA in a plain PyTorch loop, save the adapter and load it again.

    python examples/finetune_plain_loop.py

The base model has learned to tell four groups of points apart. The data then moves, and the adapter
learns what changed. Needs nothing beyond lorafast, and runs on a CPU in a few seconds.
"""

import tempfile

import torch
import torch.nn.functional as F

import lorafast

CENTRES = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0]])


def points(count, angle):
    """Points around four centres that are turned by an angle, and the group of each."""
    labels = torch.randint(4, (count,))
    turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    return CENTRES[labels] @ turn + 0.5 * torch.randn(count, 2), labels


def train(model, parameters, angle, steps):
    """Train the parameters for a number of steps. Returns the last loss."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        x, labels = points(128, angle)
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def accuracy(model, angle):
    """The share of new points whose group the model finds."""
    x, labels = points(2000, angle)
    return (model(x).argmax(dim=1) == labels).float().mean().item()


def network():
    """The base model, without weights worth having."""
    return torch.nn.Sequential(
        torch.nn.Linear(2, 64), torch.nn.ReLU(),
        torch.nn.Linear(64, 64), torch.nn.ReLU(),
        torch.nn.Linear(64, 4),
    )  # fmt: skip


def main():
    """Pretrain, adapt, train, save and load."""
    torch.manual_seed(0)
    before, after = torch.tensor(0.0), torch.tensor(1.2)
    base = network()
    train(base, base.parameters(), before, steps=100)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    print(f"base model: accuracy {accuracy(base, before):.2f} on the first data")
    print(f"base model: accuracy {accuracy(base, after):.2f} on the moved data")

    model = lorafast.adapt(base, lorafast.LoRA(r=4, alpha=8, dropout=0.05))
    print(lorafast.trainable_summary(model))
    loss = train(model, lorafast.adapter_parameters(model), after, steps=100)
    model.eval()
    print(f"adapted: loss {loss:.3f}, accuracy on the moved data {accuracy(model, after):.2f}")
    with lorafast.disable_adapter(model):
        print(f"adapter disabled: accuracy on the first data {accuracy(model, before):.2f}")

    with tempfile.TemporaryDirectory() as folder:
        lorafast.save_adapter(model, folder)
        fresh = network()
        fresh.load_state_dict(weights)
        loaded = lorafast.load_adapter(fresh, folder).eval()
    x, _ = points(8, after)
    print(f"saved and loaded: outputs are equal: {torch.equal(loaded(x), model(x))}")


if __name__ == "__main__":
    main()
