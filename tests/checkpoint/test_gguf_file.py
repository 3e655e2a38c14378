"""GGUF files of adapters, read back with the gguf package."""

import json

import pytest
import torch
from helpers import tiny_transformers

import lorafast
from lorafast import LaMDA, LoRA
from lorafast import __main__ as command_line
from lorafast.checkpoint import gguf_file
from lorafast.checkpoint.export_lora import LoRAExport
from lorafast.checkpoint.portable import plain_lora

gguf = pytest.importorskip("gguf")


def folders(tmp_path, kind="llama", adapter=None):
    """Save an adapted tiny model and its config. Returns both folders."""
    model = tiny_transformers.KINDS[kind]()
    model = tiny_transformers.adapted(model, adapter or LoRA(r=4, alpha=16, rslora=True))
    lorafast.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(model.config.to_dict()))
    return tmp_path / "adapter", tmp_path / "base", model


def export(adapter, base, out, *words):
    return command_line.main(
        ["export", str(adapter), "--to", "gguf", "--base", str(base), "--out", str(out), *words]
    )


@pytest.mark.parametrize("adapter", [LoRA(r=4, alpha=16, rslora=True), LaMDA(r=4)], ids=str)
def test_tensors_and_metadata_are_read_back(adapter, tmp_path):
    folder, base, _ = folders(tmp_path, adapter=adapter)
    assert export(folder, base, tmp_path / "a.gguf") == 0
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    want = plain_lora(folder)
    R = want.config["r"]
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == R
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == len(want.tensors)
    names = {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.v_proj": "attn_v"}
    for layer, name in names.items():
        A, B = (
            want.tensors[f"base_model.model.model.layers.0.{layer}.lora_{part}.weight"]
            for part in "AB"
        )
        assert torch.equal(tensors[f"blk.0.{name}.weight.lora_a"], A)
        assert torch.equal(tensors[f"blk.0.{name}.weight.lora_b"], B)


def test_rows_of_q_and_k_are_in_llama_cpps_order(tmp_path):
    """The order that convert_hf_to_gguf gives the weight itself: of BA it is that of B's rows."""
    folder, base, model = folders(tmp_path)
    assert export(folder, base, tmp_path / "a.gguf") == 0
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    want, config = plain_lora(folder).tensors, model.config
    for layer, name, heads in (
        ("q_proj", "attn_q", config.num_attention_heads),
        ("k_proj", "attn_k", config.num_key_value_heads),
    ):
        B = want[f"base_model.model.model.layers.0.self_attn.{layer}.lora_B.weight"]
        found = tensors[f"blk.0.{name}.weight.lora_b"]
        half = B.shape[0] // heads // 2
        for head in range(heads):
            for i in range(half):
                for side in (0, 1):
                    old, new = head * 2 * half + side * half + i, head * 2 * half + 2 * i + side
                    assert torch.equal(found[new], B[old])


@pytest.mark.parametrize("kind", gguf_file.ARCHITECTURES)
def test_the_layers_of_every_base_have_a_name(kind, tmp_path):
    layers = {"mlp.down_proj": "ffn_down", "self_attn.o_proj": "attn_output"}
    fused = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
    layers |= fused if kind == "phi3" else {"self_attn.q_proj": "attn_q", "mlp.up_proj": "ffn_up"}
    factors = {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(8, 2)}
    tensors = {
        f"base_model.model.model.layers.1.{layer}.{part}.weight": factor
        for layer in layers
        for part, factor in factors.items()
    }
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": kind, "num_hidden_layers": 2, "num_attention_heads": 2})
    )
    export = LoRAExport(tensors, {"lora_alpha": 2}, {})
    gguf_file.write(export, tmp_path / "a.gguf", tmp_path)
    found = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    wanted = {f"blk.1.{name}.weight.lora_{side}" for name in layers.values() for side in "ab"}
    assert found == wanted


def test_factors_in_fp16(tmp_path):
    folder, base, _ = folders(tmp_path)
    assert export(folder, base, tmp_path / "a.gguf", "--dtype", "fp16") == 0
    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds == {gguf.GGMLQuantizationType.F16}


def test_a_base_without_a_name_in_llama_cpp_is_one_line(tmp_path, capsys):
    folder, base, _ = folders(tmp_path, "gpt2", LoRA(r=2))
    assert export(folder, base, tmp_path / "a.gguf") == 2
    assert "the base is a 'gpt2'; GGUF files are written for llama" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main(["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "b")])
    assert "--base: a GGUF file has the names of the base" in capsys.readouterr().err
