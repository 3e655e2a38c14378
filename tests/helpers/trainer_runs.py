"""Short runs of transformers' Trainer on a tiny adapted Llama, and their checkpoints."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import lorafast
from lorafast import DoRA, LaMDA, LoRA, PiSSA, VeRA
from lorafast.integrations.trainer import AdapterCheckpoint
from lorafast.schedule import LaMDAFreeze

STEPS, HALF = 6, 3
IDS = torch.arange(16).reshape(2, 8)
RUNS = {
    "lora": (LoRA(r=4, dropout=0.3), {}),
    "dora": (DoRA(r=4, dropout=0.3), {"bias": "all"}),
    "lamda": (LaMDA(r=4, dropout=0.3), {"rank_pattern": {"q_proj": 3}}),
    "lamda-frozen": (LaMDA(r=4, dropout=0.3), {"schedule": 0.4}),
    "lamda-freezing": (LaMDA(r=4, dropout=0.3), {"schedule": 0.9}),
    "pissa": (LoRA(r=4, dropout=0.3, init=PiSSA()), {"bias": "lora_only"}),
    "dora-pissa": (DoRA(r=4, dropout=0.3, init=PiSSA()), {}),
    "vera": (VeRA(r=8, dropout=0.3), {"modules_to_save": ["lm_head", "norm"]}),
    "embedding": (
        LoRA(r=4, dropout=0.3),
        {"target_modules": ["embed_tokens", "v_proj"], "modules_to_save": ["lm_head"]},
    ),
    "tied": (
        LoRA(r=4, dropout=0.3),
        {"modules_to_save": ["embed_tokens", "lm_head"], "tie_word_embeddings": True},
    ),
}


def base(**fields):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(max_position_embeddings=32, attention_bias=True, **sizes | fields)
    ).eval()


def adapted(adapter=RUNS["lora"][0], seed=1, tie_word_embeddings=False, **options):
    return lorafast.adapt(
        base(tie_word_embeddings=tie_word_embeddings), adapter, seed=seed, **options
    )


def data():
    tokens = torch.randint(64, (16, 8), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in tokens]


class Stop(TrainerCallback):
    """As if the run had been killed after its first checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


def trainer_of(model, folder, *callbacks, model_init=None, **arguments):
    arguments = {
        "max_steps": STEPS,
        "save_steps": HALF,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
    } | arguments
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    args = TrainingArguments(str(folder), per_device_train_batch_size=2, **quiet | arguments)
    tokens = data()
    trainer = Trainer(
        model, args, None, tokens, tokens[:4], model_init=model_init, callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def prepared(run):
    """A model anew, and the callback for it."""
    adapter, options = RUNS[run][0], dict(RUNS[run][1])
    fraction = options.pop("schedule", None)
    model = adapted(adapter, **options)
    return model, AdapterCheckpoint(fraction and LaMDAFreeze(model, STEPS, fraction))


def assert_same(model, want):
    found, want = model.state_dict(), want.state_dict()
    assert list(found) == list(want)
    assert not [name for name in want if not torch.equal(found[name], want[name])]
