"""Opacus' gradients of each sample are right for most adapters, and refused in words for DoRA.

Opacus calls a layer once more under torch.func for each sample's gradient.
"""

import warnings

import pytest
import torch
from torch import nn

import lorafast
from lorafast import AdaLoRA, DoRA, LaMDA, LoRA, PiSSA, VeRA

opacus = pytest.importorskip("opacus", reason="Opacus is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

SAMPLES = 5
SHAPES = [(SAMPLES, 12), (SAMPLES, 3, 12), (SAMPLES, 2, 3, 12)]
ADAPTERS = [
    LoRA(r=2),
    LoRA(r=2, init=PiSSA()),
    LaMDA(r=2),
    VeRA(r=4),
    AdaLoRA(r=2, target_r=1),
]


def adapted(adapter, **options):
    """Return a net in double precision whose adapters are away from their start."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    model = lorafast.adapt(net, adapter, seed=1, **options)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients_one_by_one(model, x):
    """Each sample's gradients by a backward pass of its own."""
    rows = []
    for i in range(SAMPLES):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        rows.append({name: p.grad for name, p in trained(model).items()})
    model.zero_grad()
    return {name: torch.stack([row[name] for row in rows]) for name in trained(model)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)
def test_each_samples_gradients_are_those_of_its_own_backward(adapter, shape):
    model = adapted(adapter, bias="lora_only")
    x = torch.randn(shape, dtype=torch.float64)
    want = gradients_one_by_one(model, x)
    private = opacus.GradSampleModule(model, loss_reduction="sum")
    private(x).square().sum().backward()
    found = {name: p.grad_sample for name, p in trained(model).items()}
    assert any(gradient.any() for gradient in want.values())
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("adapter", [DoRA(r=2), DoRA(r=2, axis="in"), DoRA(magnitude_only=True)])
def test_dora_is_refused_in_words(adapter):
    private = opacus.GradSampleModule(adapted(adapter), loss_reduction="sum")
    loss = private(torch.randn(SAMPLES, 12, dtype=torch.float64)).square().sum()
    with pytest.raises(NotImplementedError, match=r"no torch\.func transforms"):
        loss.backward()


def test_dropout_is_refused_by_torch():
    """The second call of the layer would draw another mask than the first."""
    private = opacus.GradSampleModule(adapted(LoRA(r=2, dropout=0.5)), loss_reduction="sum")
    loss = private(torch.randn(SAMPLES, 12, dtype=torch.float64)).square().sum()
    with pytest.raises(RuntimeError, match="random operation"):
        loss.backward()


def test_a_private_run_trains_the_adapter():
    model = adapted(LoRA(r=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = torch.randn(32, 12, dtype=torch.float64), torch.randn(32, 4, dtype=torch.float64)
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    engine = opacus.PrivacyEngine()
    with warnings.catch_warnings():
        # That its random numbers are not those of cryptography.
        warnings.simplefilter("ignore")
        private, optimizer, rows = engine.make_private(
            module=model, optimizer=optimizer, data_loader=rows, noise_multiplier=1.0,
            max_grad_norm=1.0,
        )  # fmt: skip
    for inputs, targets in rows:
        optimizer.zero_grad()
        (private(inputs) - targets).square().mean().backward()
        optimizer.step()
    names = trained(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is (name not in names), name
    assert engine.get_epsilon(1e-5) > 0


@pytest.mark.peft
def test_accelerated_layers_give_each_samples_gradients_too():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    lorafast.accelerate(model)
    x = torch.randn(SAMPLES, 3, 12, dtype=torch.float64)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    want = gradients_one_by_one(model, x)
    opacus.GradSampleModule(model, loss_reduction="sum")(x).square().sum().backward()
    found = {name: p.grad_sample for name, p in trained(model).items()}
    torch.testing.assert_close(found, want)
