"""transformers models with bitsandbytes' linears: prepared by PEFT, trained, saved, resumed."""

import copy

import pytest
import torch

import lorafast

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

pytestmark = pytest.mark.peft
OPTIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny Llama whose widths are multiples of 64, as 4 bits on a CPU want."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def loaded(folder, bits, dtype=torch.float32):
    """Return the model with quantised linears, as users load it."""
    options = dict(OPTIONS[bits])
    if bits == "nf4":
        options["bnb_4bit_compute_dtype"] = dtype
    config = transformers.BitsAndBytesConfig(**options)
    return transformers.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map="cpu"
    )


def prepared(folder, bits, reentrant=False, **options):
    """Return the model that PEFT prepared for training, with gradient checkpointing."""
    model = peft.prepare_model_for_kbit_training(
        loaded(folder, bits, **options),
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    model.config.use_cache = False
    return model.train()


def train(model, steps=3, optimizer=None):
    """Return the losses of some steps."""
    optimizer = optimizer or torch.optim.AdamW(
        [one for one in model.parameters() if one.requires_grad], lr=1e-2
    )
    ids = torch.arange(24).reshape(2, 12)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def packed(model):
    return [one.clone() for name, one in model.named_parameters() if not one.is_floating_point()]


@pytest.mark.parametrize(
    ("adapter", "reentrant"), [(lorafast.LoRA(r=4), True), (lorafast.DoRA(r=4), False)], ids=str
)
@pytest.mark.parametrize("bits", OPTIONS)
def test_a_prepared_model_is_adapted_and_trains(folder, bits, adapter, reentrant):
    model = prepared(folder, bits, reentrant)
    assert model.is_gradient_checkpointing
    before = packed(model)
    lorafast.adapt(model, adapter)
    assert len(before) == 14
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(one.requires_grad for one in lorafast.adapter_parameters(model))
    assert all(torch.equal(*pair) for pair in zip(before, packed(model), strict=True))


# PEFT's own DoRA on int8 fails under checkpointing on a CPU: bitsandbytes' state loses its SCB.
@pytest.mark.parametrize(("bits", "use_dora"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_a_prepared_model_of_pefts_is_accelerated_with_the_same_losses(folder, bits, use_dora):
    def peft_model():
        config = peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=use_dora)
        torch.manual_seed(1)
        return peft.get_peft_model(prepared(folder, bits), config)

    expected = train(peft_model())
    model = peft_model()
    report = lorafast.accelerate(model)
    assert (len(report.taken), report.left) == (6, {})
    assert train(model) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


def test_accelerated_dora_on_int8_trains_under_checkpointing(folder):
    config = peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True)
    model = peft.get_peft_model(prepared(folder, "int8"), config)
    assert lorafast.accelerate(model).left == {}
    losses = train(model)
    assert losses[-1] < losses[0]


def test_bf16_compute_under_a_model_prepared_in_fp32(folder):
    model = prepared(folder, "nf4", dtype=torch.bfloat16)
    lorafast.adapt(model, lorafast.LoRA(r=4))
    assert model.model.layers[0].self_attn.q_proj.quantised.compute_dtype == torch.bfloat16
    losses = train(model)
    assert losses[-1] < losses[0]


def test_a_run_is_saved_and_resumed(folder, tmp_path):
    model = lorafast.adapt(prepared(folder, "nf4"), lorafast.LoRA(r=4), seed=1)
    optimizer = torch.optim.AdamW(lorafast.adapter_parameters(model), lr=1e-2)
    train(model, 2, optimizer)
    lorafast.save_adapter(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    expected = train(model, 2, optimizer)
    again = lorafast.load_adapter(prepared(folder, "nf4"), tmp_path, trainable=True)
    optimizer = torch.optim.AdamW(lorafast.adapter_parameters(again.train()), lr=1e-2)
    optimizer.load_state_dict(state)
    assert train(again, 2, optimizer) == expected


def test_peft_reads_the_adapter_beside_the_same_quantised_weights(folder, tmp_path):
    model = lorafast.adapt(prepared(folder, "nf4"), lorafast.LoRA(r=4), TARGETS)
    train(model)
    lorafast.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(loaded(folder, "nf4"), tmp_path)
    ids = torch.arange(12)[None]
    # In eval, bitsandbytes would round absmax to bf16 on CPUs with AVX512-BF16.
    with torch.no_grad():
        torch.testing.assert_close(theirs.train()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("bits", ["fp8", "nf4", "int8"])
def test_quantize_base_of_a_transformers_model(folder, bits):
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    report = lorafast.quantize_base(model, bits)
    assert len(report.layers) == 14
    assert type(model.lm_head) is torch.nn.Linear
    model = peft.prepare_model_for_kbit_training(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lorafast.adapt(model.train(), lorafast.LoRA(r=4))
    losses = train(model)
    assert losses[-1] < losses[0]


def trainer(model, folder, steps):
    ids = torch.arange(12)
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, save_steps=1, disable_tqdm=True, learning_rate=1e-2,
        ),
        train_dataset=[{"input_ids": ids, "labels": ids}] * 8,
    )  # fmt: skip


@pytest.mark.parametrize("bits", OPTIONS)
def test_trainer_takes_the_adapted_model_and_resumes(folder, bits, tmp_path):
    def adapted():
        return lorafast.adapt(loaded(folder, bits), lorafast.LoRA(r=4), seed=1)

    whole, again = adapted(), adapted()
    trainer(whole, tmp_path, 3).train()
    trainer(again, tmp_path, 3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(
        lorafast.adapter_parameters(again), lorafast.adapter_parameters(whole), strict=True
    ):
        assert torch.equal(one, other)


def test_a_model_without_adapters_is_what_transformers_says_again(folder):
    model = loaded(folder, "nf4")
    lorafast.adapt(model, lorafast.LoRA(r=4))
    assert not copy.deepcopy(model).is_quantized
    lorafast.unload(model)
    assert model.is_quantized
    assert model.config.quantization_config is not None
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, folder, 1)


@pytest.mark.parametrize("into", ["dequantise", "requantise"])
def test_a_merged_model_is_saved_and_loaded_by_transformers(folder, into, tmp_path):
    model = lorafast.adapt(prepared(folder, "nf4"), lorafast.LoRA(r=4))
    train(model)
    lorafast.merge_quantised(model, into)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert getattr(again, "is_quantized", False) == (into == "requantise")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        # Saved, double-quantised absmax is what it was; in train, nothing is packed anew.
        found, expected = again.train()(ids).logits, model.train()(ids).logits
    torch.testing.assert_close(found.float(), expected)


@pytest.mark.parametrize("bits", ["fp8", "nf4", "int8"])
def test_what_quantize_base_made_is_saved_when_it_is_dense_again(folder, bits, tmp_path):
    def quantised():
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
        lorafast.quantize_base(model, bits)
        return model

    model = lorafast.adapt(quantised(), lorafast.LoRA(r=4))
    train(model)
    lorafast.save_adapter(model, tmp_path / "adapter")
    again = lorafast.load_adapter(quantised(), tmp_path / "adapter")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(again.train()(ids).logits, expected)
        lorafast.merge_quantised(model, "dequantise", torch.float32)
        model.save_pretrained(tmp_path / "dense")
        dense = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense")
        torch.testing.assert_close(dense(ids).logits, expected)
