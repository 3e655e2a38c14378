"""Short runs of TRL's trainers: a tokenizer and data made in memory, and trainers on them."""

import datasets
import tokenizers
import torch
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from helpers.trainer_runs import base

datasets.disable_progress_bars()

ROWS = 16
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_WORDS = [f"w{i}" for i in range(60)]
_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_QUIET = {
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
}


def model(**fields):
    """Return a plain Llama of 64 tokens, the same at every call."""
    return base(**_TOKEN_IDS | fields)


def tokenizer():
    """Return a tokenizer of 60 words."""
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL.values(), *_WORDS])}
    plain = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, **_SPECIAL)


def texts(stride, length):
    """Return a text for each row."""
    return [" ".join(_WORDS[(i * stride + j) % 60] for j in range(length)) for i in range(ROWS)]


def sft(adapted, folder, arguments=None, **options):
    """Return an SFTTrainer."""
    rows = datasets.Dataset.from_dict({"text": texts(7, 8)})
    args = SFTConfig(str(folder), **_QUIET | (arguments or {}))
    return SFTTrainer(adapted, args, train_dataset=rows, processing_class=tokenizer(), **options)


def dpo(adapted, folder, arguments=None, **options):
    """Return a DPOTrainer."""
    rows = {"prompt": texts(7, 4), "chosen": texts(5, 4), "rejected": texts(3, 4)}
    args = DPOConfig(str(folder), **_QUIET | (arguments or {}))
    return DPOTrainer(
        adapted, args=args, train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(), **options,
    )  # fmt: skip


def grpo(adapted, folder, **options):
    """Return a GRPOTrainer whose reward is the number of distinct words."""
    args = GRPOConfig(
        str(folder), max_completion_length=6, num_generations=4, disable_dropout=True, **_QUIET
    )
    return GRPOTrainer(
        adapted, lambda completions, **_: [float(len({*c.split()})) for c in completions], args,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts(7, 4)}),
        processing_class=tokenizer(), **options,
    )  # fmt: skip


def logged(trainer, name="loss"):
    """Return what a trainer logged under a name, a value each step."""
    return torch.tensor([entry[name] for entry in trainer.state.log_history if name in entry])
