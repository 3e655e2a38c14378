"""save_adapter and save_pretrained of models whose tensors accelerate has offloaded."""

import accelerate
import pytest
import torch
from helpers.tiny_transformers import adapted, llama, outputs
from safetensors.torch import load_file

import lorafast
from lorafast import DoRA, LaMDA, LoRA, VeRA

pytestmark = pytest.mark.peft


@pytest.mark.parametrize("method", [LoRA(r=4), DoRA(r=4), LaMDA(r=4), VeRA(r=8)], ids=repr)
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_adapter_is_saved(method, place, tmp_path):
    options = {"modules_to_save": ["norm"], "bias": "all"}
    model = adapted(llama(), method, **options)
    lorafast.save_adapter(model, tmp_path / "want")
    want = outputs(model)
    if place == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path / "disk", execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    lorafast.save_adapter(model, tmp_path / "found")
    model.save_pretrained(tmp_path / "again")
    for folder in ("found", "again"):
        tensors, wanted = (
            load_file(tmp_path / name / "adapter_model.safetensors") for name in (folder, "want")
        )
        assert tensors.keys() == wanted.keys()
        assert not [key for key in wanted if not torch.equal(tensors[key], wanted[key])]
    torch.testing.assert_close(outputs(model), want)
    with pytest.raises(RuntimeError, match="on the meta device"):
        model.save_pretrained(tmp_path / "merged", merged=True)
