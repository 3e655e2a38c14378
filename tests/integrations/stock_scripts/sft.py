"""Supervised fine-tuning with TRL, in the manner of its sft.py: the trainer makes the PEFT model.

python sft.py --output_dir out --use_peft --lora_r 4 --max_steps 3
"""

import json
from pathlib import Path

import tokenizers
from datasets import Dataset
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]


def make_tokenizer():
    """Return a tokenizer of a few words."""
    table = {word: i for i, word in enumerate(WORDS)}
    plain = tokenizers.Tokenizer(WordLevel(table, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def main(training_args, model_args):
    set_seed(training_args.seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    rows = [" ".join(f"w{(7 * i + j) % 60}" for j in range(8)) for i in range(16)]
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=training_args,
        train_dataset=Dataset.from_dict({"text": rows}),
        processing_class=make_tokenizer(),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Path(training_args.output_dir, "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    parser = TrlParser((SFTConfig, ModelConfig))
    training_args, model_args = parser.parse_args_and_config()
    main(training_args, model_args)
