"""FSDP2's fully_shard: biases beside adapters, as docs/training.md says, and DoRA's norm."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lorafast

pytestmark = pytest.mark.distributed

X = torch.arange(48.0).reshape(3, 16).bfloat16() / 48


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def net(adapter_dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).bfloat16()
    adapter = lorafast.LoRA(r=2)
    model = lorafast.adapt(model, adapter, bias="all", seed=1, adapter_dtype=adapter_dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def gradients(model):
    model(X).float().square().sum().backward()
    trained = ((n, p.grad) for n, p in model.named_parameters() if p.requires_grad)
    return {n: getattr(grad, "full_tensor", lambda grad=grad: grad)() for n, grad in trained}


def test_trained_biases_need_adapters_of_the_bases_dtype(mesh):
    model = net(torch.bfloat16)
    want = gradients(copy.deepcopy(model))
    found = gradients(fully_shard(model, mesh=mesh))
    assert found.keys() == want.keys()
    assert sum(name.endswith("bias") for name in found) == 2
    for name, gradient in want.items():
        assert torch.equal(found[name], gradient), name


def test_without_it_torch_refuses(mesh):
    model = fully_shard(net(None), mesh=mesh)
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        model(X)


@pytest.mark.parametrize("axis", ["out", "in"])
@torch.no_grad()
def test_doras_norm_in_eval_is_that_of_a_state_dict_loaded_since(axis, mesh):
    x = X.float()
    adapter = lorafast.DoRA(r=2, axis=axis)
    model = lorafast.adapt(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), adapter).eval()
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if "lora_" in name or "weight" in name:
            parameter.add_(torch.randn_like(parameter))
    sharded = fully_shard(copy.deepcopy(model), mesh=mesh)
    torch.testing.assert_close(sharded(x), model(x))
    sharded.reshard()  # the root module keeps whole Parameters after a forward pass
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(sharded, other.state_dict(), options=options)
    torch.testing.assert_close(sharded(x), other(x))
    assert not torch.allclose(model(x), other(x))
    sharded.reshard()
    for name, parameter in sharded.named_parameters():
        if "lora_B" in name:
            parameter.mul_(0.5)
            other.get_parameter(name).mul_(0.5)
    torch.testing.assert_close(sharded(x), other(x))
