"""Put a PEFT model on lorafast's operations, in place, and undo it.

    python examples/accelerate_peft_model.py

Compares outputs, gradients and the bytes that autograd keeps for backward, before and after. Needs
peft and transformers; the model is made from a config. Runs on a CPU in a few seconds.
"""

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorafast
from lorafast import testing


def peft_model():
    """A small Llama with PEFT's DoRA on every linear."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    return peft.get_peft_model(
        base, peft.LoraConfig(r=8, use_dora=True, target_modules="all-linear")
    )


def step(model, ids):
    """The loss of one step, its gradients, and the bytes that autograd kept for backward."""
    model.zero_grad()
    found = []

    def loss():
        found.append(model(input_ids=ids, labels=ids).loss)
        return found[0]

    kept = testing.saved(loss, {}, list(model.parameters()))
    found[0].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found[0].item(), gradients, kept.own


def main():
    """Measure PEFT's forward, accelerate, and measure again."""
    model = peft_model()
    ids = torch.randint(256, (4, 64))
    loss, gradients, before = step(model, ids)

    print(lorafast.accelerate(model))
    again, ours, after = step(model, ids)

    furthest = max((ours[name] - gradients[name]).abs().max().item() for name in gradients)
    print(f"loss {loss:.6f} with PEFT, {again:.6f} with lorafast")
    print(f"{len(gradients)} gradients, the largest difference is {furthest:.1e}")
    before, after = (f"{count / 2**20:.1f} MiB" for count in (before, after))
    print(f"kept for backward: {before} with PEFT, {after} with lorafast")

    print(f"{lorafast.restore(model)} layers are PEFT's own again")


if __name__ == "__main__":
    main()
