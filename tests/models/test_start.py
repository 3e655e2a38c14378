"""Adapters made on the meta device start when their weights have come in without a state dict."""

import accelerate
import pytest
import torch
import transformers
from helpers.tiny_transformers import llama, outputs

import lorafast
from lorafast import DoRA, LaMDA, LoRA, PiSSA, VeRA

pytestmark = pytest.mark.peft

METHODS = [LoRA(r=4), DoRA(r=4), LaMDA(r=4), LoRA(r=4, init=PiSSA()), VeRA(r=8)]
methods = pytest.mark.parametrize("method", METHODS, ids=repr)


@pytest.fixture
def checkpoint(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def empty(method, checkpoint):
    config = transformers.LlamaConfig.from_pretrained(checkpoint)
    with accelerate.init_empty_weights():
        return lorafast.adapt(transformers.LlamaForCausalLM(config), method).eval()


def assert_started(model):
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]
    torch.testing.assert_close(outputs(model), outputs(llama()), rtol=1e-4, atol=1e-5)
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    model.train()(input_ids=torch.arange(6)[None]).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@methods
def test_start_adapters_after_load_checkpoint_in_model(method, checkpoint):
    model = empty(method, checkpoint)
    accelerate.load_checkpoint_in_model(model, checkpoint, device_map={"": "cpu"})
    with pytest.raises(ValueError, match=r"is on meta, .*lorafast\.start_adapters\(model\)"):
        outputs(model)
    assert lorafast.start_adapters(model) is model
    if isinstance(method, VeRA):
        layers = [m for m in model.modules() if isinstance(m, lorafast.Linear)]
        assert len({id(layer.lora_A) for layer in layers if layer.in_features == 32}) == 1
    assert_started(model)


@methods
def test_load_checkpoint_and_dispatch_starts_them(method, checkpoint):
    model = empty(method, checkpoint)
    model = accelerate.load_checkpoint_and_dispatch(model, checkpoint, device_map={"": "cpu"})
    assert_started(model)


def test_what_has_started_stays():
    model = lorafast.adapt(llama(), LoRA(r=4))
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B.add_(1)
    before = layer.lora_B.clone()
    lorafast.start_adapters(model).to(torch.float64)
    assert torch.equal(layer.lora_B, before.double())
    with pytest.raises(ValueError, match="no adapted layer"):
        lorafast.start_adapters(llama())


def test_a_model_on_the_meta_device_stays_there(checkpoint):
    model = lorafast.start_adapters(empty(LoRA(r=4), checkpoint))
    assert all(parameter.is_meta for parameter in model.to(torch.float64).parameters())
    # Without its buffers, which no state dict holds.
    model.to_empty(device="cpu").load_state_dict(llama().double().state_dict())
    layer = model.model.layers[0].self_attn.q_proj
    assert not layer.lora_B.any()
    assert layer.lora_A.isfinite().all()
