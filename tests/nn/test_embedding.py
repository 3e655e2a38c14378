"""lorafast.Embedding, the linear layer of one-hot rows; and Conv1D, the transposed linear."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorafast
from lorafast import DoRA, LaMDA, LoRA, PiSSA, VeRA

V, D = 11, 6
IDS = torch.tensor([[0, 3, 3], [10, 2, 0]])
ADAPTERS = [
    LoRA(r=3, alpha=5),
    LoRA(r=3, freeze_A=True),
    DoRA(r=3),
    DoRA(r=3, axis="in"),
    DoRA(r=3, detach_norm=False),
    LaMDA(r=3),
    LaMDA(r=3, init="repo"),
    LoRA(r=3, init=PiSSA()),
    DoRA(r=3, init=PiSSA()),
]
each = pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)


def moved(adapter, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = lorafast.Embedding(V, D, adapter=adapter, dtype=dtype, **options)
    with torch.no_grad():
        for name, part in layer.named_parameters():
            if name.startswith("lora"):
                part.add_(torch.randn_like(part) * 0.3)
    return layer


@each
def test_it_is_the_linear_layer_of_one_hot_rows(adapter):
    layer = moved(adapter)
    twin = lorafast.Linear(V, D, bias=False, adapter=adapter, dtype=torch.float64)
    state = {
        name: value.t() if name == "weight" else value for name, value in layer.state_dict().items()
    }
    twin.load_state_dict({name: value.clone() for name, value in state.items()})
    one_hot = nn.functional.one_hot(IDS, V).double()
    dy = torch.randn(*IDS.shape, D, dtype=torch.float64)
    layer(IDS).backward(dy)
    twin(one_hot).backward(dy)
    torch.testing.assert_close(layer(IDS), twin(one_hot))
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert grads.keys() == {
        name for name, part in adapter.tensor_specs(D, V).items() if part.trained
    }
    for name, grad in grads.items():
        torch.testing.assert_close(grad, getattr(twin, name).grad)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_starts_as_its_base_and_returns_its_dtype(adapter, dtype):
    base = nn.Embedding(V, D, dtype=dtype)
    want = base(IDS)
    layer = lorafast.Embedding.from_embedding(base, adapter)
    assert layer.weight is base.weight
    assert layer(IDS).dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(IDS), want, rtol=8 * eps, atol=8 * eps)


@each
def test_merge_unmerge_disable_and_plain(adapter):
    layer = moved(adapter)
    y, before = layer(IDS), layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(IDS), y)
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before)
    base = nn.functional.embedding(IDS, layer._base_weight().t())
    layer.disable()
    torch.testing.assert_close(layer(IDS), base)
    layer.enable()
    torch.testing.assert_close(layer(IDS), y)
    layer.restore_base()
    plain = layer.plain()
    assert type(plain) is nn.Embedding
    torch.testing.assert_close(plain(IDS), base)


@pytest.mark.peft
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("padding", [None, 3])
def test_it_is_pefts(fields, padding):
    import peft

    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(V, D, padding_idx=padding))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], **fields)
        )
    spec = (
        DoRA(r=3, alpha=5)
        if "use_dora" in fields
        else LoRA(r=3, alpha=5, rslora="use_rslora" in fields)
    )
    ours = lorafast.adapt(base, spec, ["0"])
    layer = theirs.base_model.model[0]
    assert not layer.lora_embedding_A["default"].any()
    assert not ours[0].lora_A.any()
    assert ours[0].lora_B.std() > 0.3
    pairs = [
        (ours[0].lora_A, layer.lora_embedding_A["default"]),
        (ours[0].lora_B, layer.lora_embedding_B["default"]),
    ]
    if "use_dora" in fields:
        pairs.append((ours[0].magnitude, layer.lora_magnitude_vector["default"].weight))
    with torch.no_grad():
        for mine, yours in pairs:
            mine.copy_(torch.rand_like(mine))
            yours.copy_(mine)
    y, want = ours(IDS), theirs(IDS)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy)
    for mine, yours in pairs:
        torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-4, atol=1e-5)


def test_odd_ids_and_autocast():
    layer = moved(LoRA(r=3), torch.float32)
    assert layer(torch.empty(0, 4, dtype=torch.long)).shape == (0, 4, D)
    assert layer(torch.tensor(3)).shape == (D,)
    assert torch.equal(layer(IDS.t()), layer(IDS).transpose(0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(IDS).dtype == torch.float32


@pytest.mark.compile
def test_it_compiles_whole():
    layer = moved(LoRA(r=3), torch.float32)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(IDS), layer(IDS))


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (VeRA(r=2), TypeError, "made for linears"),
        (LoRA(lora_bias=True), ValueError, "lora_bias belongs to linears"),
    ],
)
def test_what_is_for_linears_only(adapter, error, message):
    base = nn.Embedding(V, D)
    with pytest.raises(error, match=message):
        lorafast.Embedding.from_embedding(base, adapter)
    assert base.weight.requires_grad


def test_embeddings_that_would_not_survive():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 2

    for wrong, message in (
        (Scaled(V, D), "with a forward of its own"),
        (nn.Embedding(V, D, max_norm=1.0), r"max_norm=1\.0"),
        (nn.Linear(2, 2), "is a torch.nn.modules.linear.Linear"),
        (lorafast.Embedding(V, D), "is a lorafast.nn.embedding.Embedding"),
    ):
        with pytest.raises(TypeError, match=message):
            lorafast.Embedding.from_embedding(wrong)


def test_a_plain_table_loads_under_strict_and_starts_the_adapter():
    base, layer = nn.Embedding(V, D), moved(DoRA(r=3), torch.float32)
    layer.load_state_dict(base.state_dict())
    torch.testing.assert_close(layer(IDS), base(IDS))
    assert "lora_A" in lorafast.Embedding(V, D).state_dict()
    assert repr(layer) == "Embedding(11, 6, adapter=DoRA(r=3, alpha=8))"


@pytest.mark.parametrize(
    "adapter", [LoRA(r=3), DoRA(r=3), DoRA(r=3, axis="in"), LaMDA(r=3), VeRA(r=3)], ids=repr
)
def test_conv1d_is_the_transposed_linear(adapter):
    torch.manual_seed(0)
    conv, linear = Conv1D(D, V), nn.Linear(V, D)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias.normal_())
    a, b = (lorafast.adapt(nn.Sequential(module), adapter, seed=0)[0] for module in (conv, linear))
    assert isinstance(b, lorafast.Linear)
    assert not isinstance(a, nn.Linear)
    assert a.weight is conv.weight
    with torch.no_grad():
        for name in adapter.tensor_specs(D, V):
            getattr(a, name).add_(torch.randn_like(getattr(a, name)) * 0.2)
            getattr(b, name).copy_(getattr(a, name))
    x = torch.randn(4, V)
    dy = torch.randn(4, D)
    for layer in (a, b):
        layer(x).backward(dy)
    torch.testing.assert_close(a(x), b(x))
    for name, part in adapter.tensor_specs(D, V).items():
        if part.trained:
            torch.testing.assert_close(
                getattr(a, name).grad, getattr(b, name).grad, rtol=1e-4, atol=1e-5
            )
    y = a(x)
    a.merge()
    torch.testing.assert_close(a(x), y)
    plain = a.plain()
    assert type(plain) is Conv1D
    torch.testing.assert_close(plain(x), y)
    assert f"nx=11, nf=6, adapter={a.adapter}, merged\n" in repr(a)
