"""Fine-tune a causal language model with PEFT and Trainer, in the manner of transformers' run_clm.

python run_clm.py --text_file corpus.txt --output_dir out --lora_r 4 --max_steps 3
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """What is fine-tuned, and its adapter."""

    hidden_size: int = field(default=32)
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter"})
    lora_alpha: int = field(default=16)
    lora_dropout: float = field(default=0.0)


@dataclass
class DataTrainingArguments:
    """What it is fine-tuned on."""

    text_file: str = field(metadata={"help": "A file of plain text"})
    block_size: int = field(default=16)


def tokenize(line):
    """Return a line's characters as ids."""
    return [ord(letter) % 96 for letter in line]


def group_texts(lines, block_size):
    """Return blocks of one length out of all lines."""
    ids = list(chain.from_iterable(lines))
    total = len(ids) // block_size * block_size
    blocks = [ids[i : i + block_size] for i in range(0, total, block_size)]
    return [{"input_ids": block, "labels": list(block)} for block in blocks]


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(handlers=[logging.StreamHandler(sys.stdout)], level=logging.INFO)
    set_seed(training_args.seed)

    lines = Path(data_args.text_file).read_text().splitlines()
    train_dataset = group_texts(map(tokenize, lines), data_args.block_size)
    logger.info("%d blocks", len(train_dataset))

    config = GPT2Config(
        n_embd=model_args.hidden_size, n_layer=2, n_head=4, n_positions=64, vocab_size=96
    )
    model = AutoModelForCausalLM.from_config(config)
    peft_config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
    )
    model = get_peft_model(model, peft_config)
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        data_collator=default_data_collator,
    )
    result = trainer.train()
    trainer.save_model()
    metrics = result.metrics | {"train_samples": len(train_dataset)}
    trainer.save_metrics("train", metrics)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Path(training_args.output_dir, "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
