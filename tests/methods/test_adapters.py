"""Adapter specs: fields, refusals, starts."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch._subclasses import FakeTensorMode

import lorafast
from lorafast import DoRA, LaMDA, LoRA, PiSSA, VeRA
from lorafast.methods import svd, vera


def test_defaults_are_pefts():
    adapter = LoRA()
    assert (adapter.r, adapter.alpha, adapter.dropout, adapter.rslora, adapter.init) == (
        8,
        8,
        0.0,
        False,
        "kaiming",
    )
    assert LoRA(16, 32, 0.1, True, "gaussian", True, True) == LoRA(
        r=16, alpha=32, dropout=0.1, rslora=True, init="gaussian", freeze_A=True, lora_bias=True
    )
    assert LaMDA().init == "residual"


@pytest.mark.parametrize("method", [LoRA, DoRA, LaMDA])
def test_scaling(method):
    assert method(r=4, alpha=12).scaling == 3
    assert method(r=4, alpha=12, rslora=True).scaling == 6


@pytest.mark.parametrize("method", [LoRA, DoRA, LaMDA])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"r": -2}, "r=-2"),
        ({"r": 2.5}, "r=2.5"),
        ({"r": True}, "r=True"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": "8"}, "alpha='8'"),
        ({"init": "zeros"}, "init='zeros' must be one of"),
        ({"dropout": 1.0}, r"dropout 1\.0 must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout -0\.1"),
        ({"dropout": 1e-7}, "drops nothing"),
    ],
)
def test_bad_fields(method, wrong, message):
    with pytest.raises(ValueError, match=message):
        method(**wrong)


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        (DoRA, {"axis": "rows"}, "axis='rows' must be one of 'out', 'in'"),
        (DoRA, {"dropout_on": "base"}, "dropout_on='base'"),
        (DoRA, {"keep": "all"}, "keep='all'"),
        (DoRA, {"keep": "output", "dropout_on": "both", "dropout": 0.1}, "keep='inner'"),
        (DoRA, {"keep": "inner", "axis": "in"}, "belongs to axis='out'"),
        (LaMDA, {"alpha": 0}, "alpha=0"),
    ],
)
def test_bad_combinations(method, wrong, message):
    with pytest.raises(ValueError, match=message):
        method(**wrong)


@pytest.mark.parametrize(
    ("peft", "ours"),
    [
        ("lora_alpha", "alpha"),
        ("lora_dropout", "dropout"),
        ("use_rslora", "rslora"),
        ("init_lora_weights", "init"),
        ("rank", "r"),
    ],
)
def test_pefts_names_are_answered_with_ours(peft, ours):
    with pytest.raises(TypeError, match=rf"{peft}.*spelled {ours}"):
        LoRA(**{peft: 1})


def test_specs_are_values():
    adapter = DoRA(r=4, dropout=0.1)
    assert pickle.loads(pickle.dumps(adapter)) == adapter == dataclasses.replace(adapter, r=4)
    assert hash(adapter) == hash(DoRA(r=4, dropout=0.1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.r = 5


def test_lora_starts():
    weight = torch.empty(50, 400)
    kaiming, gaussian = (
        LoRA(r=16).init_tensors(weight),
        LoRA(r=16, init="gaussian").init_tensors(weight),
    )
    assert kaiming["lora_A"].abs().max() <= 1 / 20
    assert abs(kaiming["lora_A"].std().item() - 1 / 20 / 3**0.5) < 1e-3
    assert abs(gaussian["lora_A"].std().item() - 1 / 16) < 2e-3
    assert not kaiming["lora_B"].any()
    torch.manual_seed(3)
    a = LoRA().init_tensors(weight)["lora_A"]
    torch.manual_seed(3)
    assert torch.equal(a, LoRA().init_tensors(weight)["lora_A"])


@pytest.mark.parametrize(("axis", "dim"), [("out", 1), ("in", 0)])
def test_dora_starts_with_the_norm(axis, dim):
    weight = torch.randn(6, 9)
    torch.testing.assert_close(
        DoRA(r=2, axis=axis).init_tensors(weight)["lora_magnitude"], weight.norm(dim=dim)
    )


def test_dora_has_a_gain_of_exactly_one_at_the_start():
    layer = lorafast.Linear(33, 21, adapter=DoRA(r=2), dtype=torch.bfloat16)
    norm = lorafast.functional.row_norm(
        layer.weight, layer.lora_A, layer.lora_B, scaling=layer.scaling
    )
    assert torch.equal(lorafast.engine.formula.gain_of(layer.magnitude, norm), torch.ones(21))


@pytest.mark.parametrize("init", ["residual", "zero"])
@pytest.mark.parametrize("niter", [None, 0, 4])
def test_lamda_starts_on_the_top_singular_vectors(init, niter):
    weight = torch.randn(12, 20, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    adapter = LaMDA(r=3, alpha=6, init=init, svd_niter=niter)
    start = adapter.init_tensors(weight)
    A, B, core = (start[name].double() for name in ("lora_A", "lora_B", "lora_core"))
    torch.testing.assert_close(A @ A.t(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(B.t() @ B, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    # Four iterations of the randomised form are seen to reach 6e-6 on this weight; a wrong triplet
    # is off by 0.1 and more.
    torch.testing.assert_close(A.t() @ A, Vh[:3].t() @ Vh[:3], rtol=0, atol=1e-3)
    assert adapter.residual == (init == "residual")
    if init == "zero":
        assert not core.any()
    else:
        torch.testing.assert_close(2 * B @ core @ A, U[:, :3] * S[:3] @ Vh[:3], rtol=0, atol=1e-3)


def test_lamda_repo_start():
    start = LaMDA(r=4, init="repo").init_tensors(torch.empty(6, 100))
    assert not start["lora_B"].any()
    assert start["lora_A"].abs().max() <= 0.1
    assert 0 < start["lora_core"].abs().max() <= 0.5


@pytest.mark.parametrize("flag", ["rslora", "freeze_A", "lora_bias", "detach_norm", "cache_norm"])
def test_flags_are_flags(flag):
    with pytest.raises(TypeError, match=f"{flag}='no' must be True or False"):
        DoRA(**{flag: "no"})


@pytest.mark.parametrize("niter", [-1, 1.5, "a"])
def test_iterations_are_a_count(niter):
    with pytest.raises(ValueError, match="svd_niter="):
        LaMDA(svd_niter=niter)


def test_a_dropout_that_is_no_number():
    with pytest.raises(TypeError, match=r"dropout '0\.1' must be a number"):
        LoRA(dropout="0.1")


def test_a_randomised_svd_touches_no_gpu(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    svd.truncated_svd(torch.randn(30, 40), 3, 2)
    assert not seeded


def test_a_randomised_svd_repeats_itself_and_leaves_the_generator_alone():
    weight, state = torch.randn(30, 40), torch.get_rng_state()
    first, second = svd.truncated_svd(weight, 3, 2), svd.truncated_svd(weight, 3, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(14, 10), (10, 14), (9, 9)])
@pytest.mark.parametrize("niter", [None, 0, 4])
def test_pissa_starts_from_the_principal_part_and_leaves_the_rest(shape, niter):
    weight = torch.randn(shape, dtype=torch.float64)
    adapter = LoRA(r=3, alpha=5, rslora=True, init=PiSSA(niter))
    start = adapter.init_tensors(weight)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    principal = U[:, :3] * S[:3] @ Vh[:3]
    close = {"rtol": 1e-10, "atol": 1e-12} if niter != 4 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(
        adapter.scaling * start["lora_B"] @ start["lora_A"], principal, **close
    )
    torch.testing.assert_close(
        start["lora_A"].norm(dim=1), start["lora_B"].norm(dim=0)
    )  # √(Σ/s) on both sides
    layer = lorafast.Linear(shape[1], shape[0], adapter=adapter, dtype=torch.float64)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(shape[0])})
    torch.testing.assert_close(
        layer.weight + adapter.scaling * layer.lora_B @ layer.lora_A, weight, rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(layer.weight.detach(), weight - principal, **close)


def test_dora_on_pissa_measures_the_whole_weight():
    linear = torch.nn.Linear(10, 14, dtype=torch.float64)
    lengths = linear.weight.detach().norm(dim=1)
    model = lorafast.adapt(torch.nn.Sequential(linear), DoRA(r=3, init=PiSSA()))
    torch.testing.assert_close(model[0].magnitude.detach(), lengths)


@pytest.mark.parametrize("alpha", [0, -1])
def test_pissa_needs_a_positive_alpha(alpha):
    with pytest.raises(ValueError, match=rf"alpha={alpha} must be positive for init=PiSSA"):
        LoRA(alpha=alpha, init=PiSSA())
    with pytest.raises(ValueError, match="svd_niter=-1"):
        PiSSA(-1)


@pytest.mark.peft
def test_pissa_is_pefts():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    linear = torch.nn.Linear(10, 14)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(
        torch.nn.Sequential(copy.deepcopy(linear)), config
    ).base_model.model[0]
    ours = lorafast.adapt(torch.nn.Sequential(linear), LoRA(r=3, alpha=6, init=PiSSA(0)))[0]
    torch.testing.assert_close(ours.weight, theirs.base_layer.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ours.lora_B @ ours.lora_A, theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    )
    torch.testing.assert_close(
        ours.lora_A.abs(), theirs.lora_A["default"].weight.abs(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_veras_projections_depend_on_their_key_and_shapes_alone(dtype):
    vera._cached_projections.cache_clear()
    want = vera.projections(3, 8, 6, 5)
    vera._cached_projections.cache_clear()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        under = vera.projections(3, 8, 6, 5)
    finally:
        torch.set_default_dtype(default)
    with FakeTensorMode():
        vera.projections(3, 8, 6, 6)
    after = vera.projections(3, 8, 6, 5)
    for found in (under, after):
        for one, other in zip(found, want, strict=True):
            assert (type(one), one.dtype) == (torch.Tensor, torch.float32)
            assert torch.equal(one, other)
    assert type(vera.projections(3, 8, 6, 6)[0]) is torch.Tensor


@pytest.mark.peft
def test_vera_shares_what_peft_draws():
    peft = pytest.importorskip("peft")
    net = torch.nn.Sequential(torch.nn.Linear(10, 14), torch.nn.Linear(14, 6, bias=False))
    config = peft.VeraConfig(r=5, target_modules=["0", "1"], projection_prng_key=7, d_initial=0.2)
    theirs = peft.get_peft_model(copy.deepcopy(net), config).base_model
    ours = lorafast.adapt(net, VeRA(r=5, projection_prng_key=7, d_initial=0.2))
    for i, (K, N) in enumerate(((10, 14), (14, 6))):
        assert torch.equal(ours[i].lora_A, theirs.vera_A["default"][:, :K])
        assert torch.equal(ours[i].lora_B, theirs.vera_B["default"][:N])
        assert torch.equal(ours[i].core, theirs.model[i].vera_lambda_d["default"])
        assert torch.equal(ours[i].out_scale, theirs.model[i].vera_lambda_b["default"])
    assert {n.rpartition(".")[2] for n, p in ours.named_parameters() if p.requires_grad} == {
        "lora_core",
        "lora_out_scale",
    }


@pytest.mark.peft
@pytest.mark.parametrize("bias", [False, True])
def test_vera_is_pefts_forward_and_back(bias):
    """The output, dx and the gradients of both vectors against PEFT's layer, in float64."""
    peft = pytest.importorskip("peft")
    base = torch.nn.Linear(10, 14, bias=bias).double()
    theirs = peft.get_peft_model(
        torch.nn.Sequential(copy.deepcopy(base)), peft.VeraConfig(r=6, target_modules=["0"])
    ).double()
    held = theirs.base_model.model[0]
    ours = lorafast.Linear.from_linear(base, VeRA(r=6))
    with torch.no_grad():
        ours.lora_A.copy_(held.vera_A["default"])
        ours.lora_B.copy_(held.vera_B["default"])
        ours.core.copy_(held.vera_lambda_d["default"].normal_())
        ours.out_scale.copy_(held.vera_lambda_b["default"].normal_())
    x, dy = torch.randn(3, 5, 10, dtype=torch.float64), torch.randn(3, 5, 14, dtype=torch.float64)
    found = []
    for model, core, out_scale in (
        (ours, ours.core, ours.out_scale),
        (theirs, held.vera_lambda_d["default"], held.vera_lambda_b["default"]),
    ):
        own = x.clone().requires_grad_()
        y = model(own)
        found.append((y, *torch.autograd.grad(y, (own, core, out_scale), dy)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d_initial": float("inf")}, "d_initial=inf"),
        ({"projection_prng_key": -1}, "projection_prng_key=-1"),
        ({"projection_prng_key": True}, "projection_prng_key=True"),
        ({"dropout": 1.5}, r"dropout 1\.5"),
    ],
)
def test_bad_vera(wrong, message):
    with pytest.raises(ValueError, match=message):
        VeRA(**wrong)
    with pytest.raises(ValueError, match=r"largest=\(4, 4\) has no room for a weight \(14, 10\)"):
        lorafast.Linear(10, 14, adapter=VeRA(r=2, largest=(4, 4)))
