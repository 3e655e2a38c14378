"""A model without transformers, LoRA on its linears, and the shortest loop.

python plain_loop.py out
"""

import json
import sys
from pathlib import Path

import peft
import torch
from torch import nn

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
config = peft.LoraConfig(r=4, target_modules=["0", "2"], modules_to_save=["4"])
model = peft.get_peft_model(base, config)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
x, y = torch.randn(64, 16), torch.randint(4, (64,))
losses = []
for _ in range(4):
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
model.save_pretrained(sys.argv[1])
Path(sys.argv[1], "losses.json").write_text(json.dumps(losses))
