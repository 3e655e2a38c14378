"""A sequence-to-sequence model with LoRA in a loop of one's own, in the manner of PEFT's examples.

python peft_example.py out
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    default_data_collator,
    get_linear_schedule_with_warmup,
)

device = "cpu"
lr = 1e-3
num_epochs = 1
batch_size = 4

torch.manual_seed(0)
ids = torch.randint(3, 90, (12, 10), generator=torch.Generator().manual_seed(1))
dataset = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]

# creating model
config = BartConfig(
    d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, vocab_size=99,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
)  # fmt: skip
model = BartForConditionalGeneration(config)
peft_config = LoraConfig(
    task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.0
)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

train_dataloader = DataLoader(
    dataset, shuffle=True, collate_fn=default_data_collator, batch_size=batch_size
)
optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
lr_scheduler = get_linear_schedule_with_warmup(
    optimizer=optimizer,
    num_warmup_steps=0,
    num_training_steps=len(train_dataloader) * num_epochs,
)

# training and evaluation
model = model.to(device)
losses = []
for _ in range(num_epochs):
    model.train()
    for batch in tqdm(train_dataloader):
        batch = {k: v.to(device) for k, v in batch.items()}
        outputs = model(**batch)
        loss = outputs.loss
        losses.append(loss.detach().float().item())
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()

# saving model
model.save_pretrained(sys.argv[1])
Path(sys.argv[1], "losses.json").write_text(json.dumps(losses))
