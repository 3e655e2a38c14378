"""Fine-tune a transformers model with Trainer: checkpoints hold the adapter alone.

    python examples/finetune_trainer.py

A tiny Llama, made from a config without any download, learns to count. The run is interrupted after
its first checkpoint and resumed. Needs transformers; runs on a CPU in a few seconds.
"""

import tempfile
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lorafast
from lorafast.integrations.trainer import AdapterCheckpoint

VOCABULARY, LENGTH, STEPS = 32, 16, 40


def adapted_model():
    """A tiny Llama with a LoRA adapter on every linear, always with the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return lorafast.adapt(model, lorafast.LoRA(r=8, alpha=32), modules_to_save=["lm_head"], seed=0)


def counting():
    """Sequences that count upwards from every number."""
    rows = (torch.arange(start, start + LENGTH) % VOCABULARY for start in range(VOCABULARY))
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder, steps):
    """A Trainer whose checkpoints are adapters."""
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=8, learning_rate=3e-2, max_steps=STEPS, save_steps=20,
        logging_steps=10, report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    callbacks = [AdapterCheckpoint(), _StopAt(steps)]
    return Trainer(adapted_model(), arguments, train_dataset=counting(), callbacks=callbacks)


class _StopAt(transformers.TrainerCallback):
    """Stops a run early, as an interrupted job would be."""

    def __init__(self, step):
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = (
            control.should_training_stop or state.global_step >= self._step
        )


def losses(run):
    """The losses that a run has logged."""
    return [round(entry["loss"], 2) for entry in run.state.log_history if "loss" in entry]


def main():
    """Train for half of the steps, then resume from the checkpoint."""
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        first = trainer(folder, steps=20)
        first.train()
        print(f"interrupted after 20 steps, losses {losses(first)}")
        checkpoint = Path(folder) / "checkpoint-20"
        sizes = {file.name: file.stat().st_size for file in checkpoint.glob("*.safetensors")}
        print(f"its checkpoint: {sizes}")

        resumed = trainer(folder, steps=STEPS)
        resumed.train(resume_from_checkpoint=True)
        print(f"resumed to {resumed.state.global_step} steps, losses {losses(resumed)}")

        model = resumed.model.eval()
        start = torch.tensor([[3, 4, 5]])
        print(f"3, 4, 5 continues as {model.generate(start, max_new_tokens=5)[0, 3:].tolist()}")


if __name__ == "__main__":
    main()
