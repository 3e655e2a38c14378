"""MiniLM with PEFT's adapters trains and is saved after accelerate as before it."""

import copy

import peft
import pytest
import torch
from safetensors import safe_open

import lorafast
from lorafast.bench.cases.corpus import corpus
from lorafast.bench.cases.encoder import Classifier, Encoder
from lorafast.integrations import peft_linear as ours

pytestmark = [pytest.mark.peft, pytest.mark.usefixtures("few_tokens_by_op")]

STEPS, BATCH, SEQ = 50, 4, 16
CONFIGS = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa_niter_4"},
}


@pytest.fixture(scope="module")
def encoder():
    return Encoder("minilm", torch.float32, torch.device("cpu"))


def fresh(encoder, fields):
    """Return a classifier on a copy of the encoder, with PEFT's adapters at their start."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **fields)
    adapted = peft.get_peft_model(copy.deepcopy(encoder.model), config)
    return Classifier(adapted, encoder.model.config.hidden_size, 0, torch.device("cpu")).train()


def train(model, encoder):
    """The loss of every step, with the fused AdamW."""
    text = corpus().train
    picked = torch.randperm(len(text), generator=torch.Generator().manual_seed(0)).tolist()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=5e-4, fused=True), []
    for step in range(STEPS):
        batch = encoder.batch([text[i] for i in picked[step * BATCH : (step + 1) * BATCH]], SEQ)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            model(batch["input_ids"], batch["attention_mask"]), batch["labels"]
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def keys(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return [key.encode() for key in file.keys()]  # noqa: SIM118  (it is no dict)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_fifty_steps_are_the_same_before_and_after(name, encoder, tmp_path, calls):
    plain, swapped = (fresh(encoder, CONFIGS[name]) for _ in range(2))
    plain.encoder.save_pretrained(tmp_path / "start")
    report = lorafast.accelerate(swapped)
    swapped.encoder.save_pretrained(tmp_path / "swapped")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "swapped" / file).read_bytes() == (
            tmp_path / "start" / file
        ).read_bytes()
    layers = len([m for m in swapped.modules() if isinstance(m, ours.Linear)])
    assert len(report.taken) == layers == 36
    assert report.left == {}
    want, found = train(plain, encoder), train(swapped, encoder)
    assert (calls["fast"], calls["why"]) == (layers * STEPS, [])
    assert max(abs(a - b) for a, b in zip(found, want, strict=True)) <= 1e-3
    assert sum(found[-10:]) < sum(found[:10])
    swapped.encoder.save_pretrained(tmp_path / "trained")
    plain.encoder.save_pretrained(tmp_path / "plainly")
    assert keys(tmp_path / "trained") == keys(tmp_path / "plainly") == keys(tmp_path / "start")
