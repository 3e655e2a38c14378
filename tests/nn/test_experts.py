"""lorafast.Experts: each expert as a lorafast.Linear, merging, state dicts, refusals."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lorafast
from lorafast import DoRA, LaMDA, LoRA, reference, testing
from lorafast.engine import error_rule, philox
from lorafast.nn.stacked_linear import StackedLinear

E, K, N, S = 5, 10, 14, 23
# The second expert and the last have no rows, the third one.
OFFSETS = torch.tensor([0, 9, 9, 10, 23, 23], dtype=torch.int32)
ROWS = torch.arange(S).flip(0) * 3
ADAPTERS = [
    LoRA(r=3, alpha=6),
    LoRA(r=3, alpha=6, rslora=True, lora_bias=True, freeze_A=True, init="gaussian"),
    DoRA(r=3, alpha=6),
    DoRA(r=3, alpha=6, keep="recompute", detach_norm=False),
    DoRA(magnitude_only=True),
    LaMDA(r=3, init="repo"),
    LaMDA(r=3, init="zero"),
]
RESIDUAL = [LaMDA(r=3), LoRA(r=3, init=lorafast.PiSSA())]


def experts(adapter, dtype=torch.float64, trained=True, **options):
    """Return experts with random weights, and factors as if trained."""
    layer = lorafast.Experts(E, K, N, adapter=adapter, dtype=dtype, **options)
    if trained:
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.startswith("lora") and not getattr(adapter, "magnitude_only", False):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def x_of(dtype=torch.float64):
    return torch.randn(S, K, dtype=dtype, requires_grad=True)


def truth(layer, x):
    """Return the output by the loop over experts, whatever the seed of dropout."""
    tensors = layer._tensors()
    return reference.grouped_linear(
        x, OFFSETS, *tensors[:6], None, lora_bias=tensors.lora_bias, scaling=layer.scaling,
        detach_norm=layer.adapter.detach_norm,
    )  # fmt: skip


def gradients(y, layer, x):
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return torch.autograd.grad(y, [x, *trained], dy.to(y.dtype))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_each_expert_is_a_layer(adapter, transposed):
    layer, x = experts(adapter, transposed=transposed), x_of()
    y = layer(x, OFFSETS)
    torch.testing.assert_close(y, truth(layer, x), rtol=1e-10, atol=1e-10)
    for own, expected in zip(
        gradients(y, layer, x), gradients(truth(layer, x), layer, x), strict=True
    ):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)
    for e in (0, 2):
        single = layer_of_expert(layer, e)
        rows = slice(OFFSETS[e], OFFSETS[e + 1])
        torch.testing.assert_close(single(x[rows]), y[rows], rtol=1e-9, atol=1e-9)


def layer_of_expert(layer, e):
    """Return a lorafast.Linear with one expert's tensors."""
    single = lorafast.Linear(K, N, adapter=layer.adapter, dtype=layer.weight.dtype)
    with torch.no_grad():
        single.weight.copy_(layer._W()[e])
        for name, parameter in single.named_parameters():
            if name != "weight":
                parameter.copy_(getattr(layer, name)[e])
    return single


@pytest.mark.parametrize("adapter", ADAPTERS[:3], ids=str)
def test_experts_without_rows_get_gradients_of_zero(adapter):
    layer, x = experts(adapter), x_of()
    layer(x, OFFSETS).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert not parameter.grad[[1, 4]].any(), name
            assert parameter.grad[0].any(), name


@pytest.mark.parametrize("shared", ["A", "B"])
@pytest.mark.parametrize("adapter", [ADAPTERS[0], ADAPTERS[2], ADAPTERS[5]], ids=str)
def test_a_factor_of_all_experts(adapter, shared):
    layer, x = experts(adapter, shared=shared), x_of()
    factor = layer.lora_A if shared == "A" else layer.lora_B
    assert factor.shape == ((3, K) if shared == "A" else (N, 3))
    y, expected = layer(x, OFFSETS), truth(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for own, other in zip(gradients(y, layer, x), gradients(expected, layer, x), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)
    layer.merge()
    torch.testing.assert_close(layer(x, OFFSETS), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "adapter",
    [
        LoRA(r=3, alpha=6, dropout=0.4),
        DoRA(r=3, alpha=6, dropout=0.4),
        DoRA(r=3, alpha=6, dropout=0.4, dropout_on="both"),
        LaMDA(r=3, init="repo", dropout=0.4),
    ],
    ids=str,
)
def test_dropout_depends_on_the_unsorted_rows(adapter):
    layer, x = experts(adapter), x_of()
    torch.manual_seed(5)
    y = layer(x, OFFSETS, ROWS)
    torch.manual_seed(5)
    seed = philox.draw_seed("cpu")
    expected = reference.grouped_linear(
        x, OFFSETS, *layer._tensors()[:6], scaling=layer.scaling, dropout=0.4,
        dropout_on=adapter.dropout_on, seed=seed, rows=ROWS,
    )  # fmt: skip
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for own, other in zip(gradients(y, layer, x), gradients(expected, layer, x), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)
    torch.manual_seed(5)
    assert not torch.equal(layer(x, OFFSETS), y)
    layer.eval()
    assert torch.equal(layer(x, OFFSETS, ROWS), layer(x, OFFSETS))


@pytest.mark.parametrize("adapter", [ADAPTERS[0], ADAPTERS[2], LaMDA(r=3, init="zero")], ids=str)
def test_bf16_errs_at_most_twice_what_eager_errs(adapter):
    layer = experts(adapter, torch.bfloat16)
    wide = copy.deepcopy(layer).double()
    x = x_of(torch.bfloat16)
    wide_x = x.detach().double().requires_grad_()

    def run(model, given, forward):
        y = forward(model, given)
        return [y, *gradients(y, model, given)]

    exact = [t.detach().double() for t in run(wide, wide_x, truth)]
    own = [t.detach().double() for t in run(layer, x, lambda m, g: m(g, OFFSETS))]
    eager = [t.detach().double() for t in run(layer, x, truth)]
    comparison = error_rule.compare(lambda: own, exact, eager, torch.bfloat16)
    assert not comparison.why_wrong


@pytest.mark.parametrize("adapter", [*ADAPTERS[:4], *ADAPTERS[5:], *RESIDUAL], ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_merge_and_unmerge(adapter, keep):
    layer, x = experts(adapter, transposed=True), x_of()
    y, weight, bias = layer(x, OFFSETS), layer.weight.clone(), layer.bias.clone()
    layer.merge(keep=keep)
    assert layer.merged
    torch.testing.assert_close(layer(x, OFFSETS), y, rtol=1e-9, atol=1e-9)
    plain = layer.plain()
    assert type(plain) is StackedLinear
    assert plain.weight is layer.weight
    torch.testing.assert_close(plain(x, OFFSETS), y, rtol=1e-9, atol=1e-9)
    layer.unmerge()
    torch.testing.assert_close(layer.weight, weight, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.bias, bias)
    assert not keep or torch.equal(layer.weight, weight)


@pytest.mark.parametrize("adapter", RESIDUAL, ids=str)
def test_a_residual_start_leaves_the_output(adapter):
    weight = nn.Parameter(torch.randn(E, N, K, dtype=torch.float64))
    before, x = weight.detach().clone(), x_of()
    layer = lorafast.Experts.from_parameter(weight, adapter)
    assert layer.weight is weight
    assert not torch.equal(weight, before)
    base = reference.grouped_linear(
        x, OFFSETS, before, None, layer.lora_A * 0, layer.lora_B, layer.core
    )
    torch.testing.assert_close(layer(x, OFFSETS), base, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        layer.lora_B.add_(1)
    layer.disable()
    torch.testing.assert_close(layer(x, OFFSETS), base, rtol=1e-9, atol=1e-9)
    layer.enable()
    layer.reset_adapter()
    torch.testing.assert_close(layer(x, OFFSETS), base, rtol=1e-9, atol=1e-9)
    layer.restore_base()
    torch.testing.assert_close(weight.detach(), before)


def test_from_parameter_shares_the_memory():
    weight, bias = torch.randn(E, K, N), nn.Parameter(torch.randn(E, N))
    layer = lorafast.Experts.from_parameter(weight, LoRA(r=2), transposed=True, bias=bias)
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert layer.bias is bias
    assert not bias.requires_grad
    assert layer.lora_A.shape == (E, 2, K)
    assert layer.lora_B.shape == (E, N, 2)
    assert (layer.r, layer.scaling, layer.merged) == (2, 4.0, False)
    shown = (
        "num_experts=5, in_features=10, out_features=14, bias=True, transposed=True, "
        "adapter=LoRA(r=2, alpha=8)"
    )
    assert repr(layer) == f"Experts(\n  {shown}\n  (lora_dropout): Identity()\n)"


def test_factors_start_as_those_of_layers():
    layer = experts(LoRA(r=2), torch.bfloat16, trained=False)
    assert layer.lora_A.dtype == torch.float32
    assert 0.8 / K**0.5 < layer.lora_A.abs().max() <= 1 / K**0.5
    assert not torch.equal(layer.lora_A[0], layer.lora_A[1])
    assert not layer.lora_B.any()
    dora = experts(DoRA(r=2), trained=False)
    torch.testing.assert_close(dora.magnitude.detach(), dora.weight.norm(dim=2))


def test_copies_and_pickles():
    layer, x = experts(DoRA(r=3, dropout=0.1), shared="A").eval(), x_of()
    y = layer(x, OFFSETS)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, OFFSETS), y)
        assert other.shared == "A"
        assert other.lora_A is not layer.lora_A


def test_state_dicts():
    layer = experts(DoRA(r=3))
    other = experts(DoRA(r=3))
    other.load_state_dict(layer.state_dict())
    x = x_of()
    assert torch.equal(other(x, OFFSETS), layer(x, OFFSETS))
    base = {name: value for name, value in layer.state_dict().items() if "lora" not in name}
    with pytest.warns(UserWarning, match="trained adapters start anew"):
        other.load_state_dict(base)
    assert not other.lora_B.any()
    torch.testing.assert_close(other.magnitude.detach(), layer.weight.norm(dim=2))
    with pytest.raises(RuntimeError, match="part of an adapter"):
        other.load_state_dict(base | {"lora_A": layer.lora_A})


def test_the_meta_device():
    layer = lorafast.Experts(E, K, N, adapter=DoRA(r=3), device="meta")
    weights = StackedLinear(E, K, N).state_dict()
    layer.to_empty(device="cpu")
    layer.load_state_dict(weights)
    torch.testing.assert_close(layer.magnitude.detach(), weights["weight"].norm(dim=2))
    assert layer(x_of(torch.float32), OFFSETS).shape == (S, N)


def test_frozen_columns():
    layer, x = experts(LaMDA(r=4, init="repo")), x_of()
    layer.freeze_columns(2)
    layer(x, OFFSETS).sum().backward()
    assert not layer.lora_B.grad[..., :2].any()
    assert layer.lora_B.grad[0, :, 2:].any()
    before = layer.lora_B.detach().clone()
    with torch.no_grad():
        layer.lora_B.add_(1)
    layer.restore_columns()
    assert torch.equal(layer.lora_B[..., :2], before[..., :2])
    layer.freeze_columns(4)
    assert not layer.lora_B.requires_grad


def test_no_rows_at_all():
    layer = experts(LoRA(r=3))
    x = torch.zeros(0, K, dtype=torch.float64, requires_grad=True)
    y = layer(x, torch.zeros(E + 1, dtype=torch.int32))
    assert y.shape == (0, N)
    y.sum().backward()
    assert not layer.lora_B.grad.any()
    layer.merge()
    assert layer(x, torch.zeros(E + 1, dtype=torch.int32)).shape == (0, N)


def test_steps_of_training():
    layer, x, target = experts(LoRA(r=3), trained=False), x_of(), torch.randn(S, N).double()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x, OFFSETS) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("adapter", "options", "message"),
    [
        (DoRA(axis="in"), {}, "axis='in' is not offered for experts"),
        (DoRA(cache_norm=True), {}, "no cache_norm"),
        (lorafast.VeRA(r=4), {}, "VeRA is made for single layers; take LoRA, DoRA or LaMDA"),
        (lorafast.AdaLoRA(r=4, target_r=2), {}, "AdaLoRA is made for single layers"),
        (lorafast.AFLoRA(r=4), {}, "AFLoRA is made for single layers"),
        (LoRA(r=2, init=lorafast.LoRAGA({})), {}, "LoRAGA has gradients of single layers"),
        (LaMDA(r=2), {"shared": "A"}, "its start is made from each expert's weight"),
        (LoRA(r=2), {"shared": "C"}, "shared='C' must be 'A', 'B' or None"),
    ],
)
def test_refusals_leave_the_weight_as_it_was(adapter, options, message):
    weight = nn.Parameter(torch.randn(E, N, K))
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        lorafast.Experts.from_parameter(weight, adapter, **options)
    assert torch.equal(weight, before)
    assert weight.requires_grad


def test_wrong_tensors_are_refused():
    with pytest.raises(ValueError, match=r"weight \(3, 4\) must be \[E>0, N, K\]"):
        lorafast.Experts.from_parameter(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"bias \(5, 10\) must be \(5, 14\) for N=14"):
        lorafast.Experts.from_parameter(torch.randn(E, N, K), bias=torch.randn(E, K))
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        lorafast.Experts.from_parameter(torch.zeros(E, N, K, dtype=torch.uint8))
    with pytest.raises(TypeError, match="adapter must be a lorafast adapter"):
        lorafast.Experts(E, K, N, adapter=3)


@pytest.mark.parametrize("adapter", [LoRA(r=3), DoRA(r=3, keep="inner"), LaMDA(r=3, init="zero")])
def test_explain_counts_what_is_saved(adapter):
    layer, x = experts(adapter, torch.float32, bias=False), x_of(torch.float32)
    (row,) = lorafast.explain(layer).rows
    assert (row.shape, row.r) == ((N, K), 3)
    saved = testing.saved(lambda: layer(x, OFFSETS), {"x": x}, list(layer.parameters()))
    norm = 4 * E * N if layer.magnitude is not None else 0
    # The offsets, which all layers of a step share.
    assert saved.own - OFFSETS.nbytes == row.saved * S + norm
    assert ("x" in row.referenced) == (layer.lora_A.requires_grad)
    assert f"{E} experts" in str(lorafast.explain(layer))
