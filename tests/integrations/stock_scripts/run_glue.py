"""Fine-tune a sequence classifier with PEFT and Trainer, in the manner of transformers' run_glue.

python run_glue.py --task_name parity --output_dir out --do_train --do_eval --max_steps 3
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

task_to_labels = {"parity": 2, "thirds": 3}


@dataclass
class DataTrainingArguments:
    """The task."""

    task_name: str = field(metadata={"help": "One of " + ", ".join(task_to_labels)})
    max_seq_length: int = field(default=12)

    def __post_init__(self):
        if self.task_name not in task_to_labels:
            raise ValueError("Unknown task: " + self.task_name)


class Sentences(torch.utils.data.Dataset):
    """Random ids, whose label is their sum by the number of labels."""

    def __init__(self, rows, length, num_labels, seed):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, 60, (rows, length), generator=generator)
        self.labels = self.ids.sum(1) % num_labels

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": self.labels[index],
        }


def main():
    parser = HfArgumentParser((DataTrainingArguments, TrainingArguments))
    data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    num_labels = task_to_labels[data_args.task_name]
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=60, max_position_embeddings=32, num_labels=num_labels,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.0,
        target_modules=["query", "key", "value", "dense"],
    )  # fmt: skip
    model = get_peft_model(model, lora)
    train, evaluation = (
        Sentences(24, data_args.max_seq_length, num_labels, seed) for seed in (0, 1)
    )

    def compute_metrics(p: EvalPrediction):
        preds = p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions
        return {"accuracy": float((np.argmax(preds, axis=1) == p.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train if training_args.do_train else None,
        eval_dataset=evaluation if training_args.do_eval else None,
        compute_metrics=compute_metrics,
    )
    losses = []
    if training_args.do_train:
        trainer.train()
        trainer.save_model()
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if training_args.do_eval:
        metrics = trainer.evaluate(eval_dataset=evaluation)
        trainer.log_metrics("eval", metrics)
        losses.append(metrics["eval_loss"])
    Path(training_args.output_dir, "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
