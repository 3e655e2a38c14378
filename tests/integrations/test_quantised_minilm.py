"""MiniLM on quantised weights: lorafast's adapters train as PEFT's, and save no weight."""

import pytest
import torch

from lorafast import testing

pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from lorafast.bench.cases import implementations, quantised_base, recipes, train_task
from lorafast.bench.cases.corpus import corpus
from lorafast.bench.cases.encoder import Encoder
from lorafast.integrations import peft_quantised
from lorafast.nn.quantised_linear import QuantisedLinear

pytestmark = pytest.mark.peft

BATCH, SEQ, R = 4, 16, 8
# The losses of two correct implementations differ by less.
MAX_GAP = 1e-3


@pytest.fixture(scope="module")
def encoder():
    return Encoder("minilm", torch.float32, torch.device("cpu"))


def build(impl, method, encoder, base_format):
    """Return the bench's task: the same start and the same AdamW for every implementation."""
    parsed, adapter = implementations.parse(impl), recipes.spec(method, R, 0.0)
    return train_task.build(
        parsed, method, adapter, encoder, 0, 5e-4, 0, R, base_format=base_format
    )


def batches(encoder, steps):
    text = corpus().train
    picked = torch.randperm(len(text), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(steps):
        yield encoder.batch([text[i] for i in picked[step * BATCH : (step + 1) * BATCH]], SEQ)


def train(task, encoder, steps):
    """Return the loss of every step."""
    losses = []
    for batch in batches(encoder, steps):
        task.step(batch, 0, losses)(lambda: None)
    return [loss.item() for loss in losses]


def saved_bytes(task, encoder):
    (batch,) = batches(encoder, 1)
    constant = [*task.model.parameters(), *task.model.buffers()]
    return testing.saved(lambda: task.loss(batch), {}, constant).own


def weights(task):
    """Return the dequantised weight of every adapted layer."""
    dense = (quantised_base.dense_linear(layer.base_layer) for layer in task.layers.values())
    return [linear.weight for linear in dense]


@pytest.mark.parametrize(
    ("base_format", "method", "steps"),
    [
        ("nf4", "dora", 2),
        *(
            pytest.param(base_format, method, 50, marks=pytest.mark.slow)
            for base_format in ("nf4", "nf4-plain", "int8")
            for method in ("lora", "dora")
        ),
    ],
)
def test_losses_follow_pefts_and_saved_bytes_equal_the_dense_bases(
    base_format, method, steps, encoder
):
    peft, ours, accelerated = (
        build(impl, method, encoder, base_format) for impl in ("peft", "lorafast", "accelerated")
    )
    kinds = (QuantisedLinear, peft_quantised.QuantisedMixin)
    for task, kind in zip((ours, accelerated), kinds, strict=True):
        assert len(task.layers) == 36
        assert all(isinstance(layer, kind) for layer in task.layers.values())
        dense = build(str(task.impl), method, encoder, "dense")
        assert saved_bytes(task, encoder) == saved_bytes(dense, encoder) > 0
    assert not any(map(peft_quantised.why_not_state, accelerated.layers.values()))
    before = weights(ours)
    want = train(peft, encoder, steps)
    for task in (ours, accelerated):
        found = train(task, encoder, steps)
        assert max(abs(a - b) for a, b in zip(found, want, strict=True)) <= MAX_GAP
        if steps >= 20:
            assert sum(found[-10:]) < sum(found[:10])
        for one, other in zip(weights(task), before, strict=True):
            assert torch.equal(one, other)
