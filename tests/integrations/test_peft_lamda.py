"""LaMDA as one of PEFT's adapters: against lorafast.Linear, beside others, in PEFT's hands."""

import copy
import io

import peft
import pytest
import torch
import transformers
from helpers.peft_models import (
    ALL,
    K,
    N,
    Net,
    X,
    assert_same,
    config,
    lamda_config,
    lamda_model,
    lamda_with_another,
    output_and_gradients,
    peft_model,
    perturb,
)
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lorafast
from lorafast import testing
from lorafast.integrations import peft_calls
from lorafast.integrations import peft_linear as ours

pytestmark = pytest.mark.peft


def one_layer(base, **fields):
    """A layer of PEFT's around the base, its adapter away from its start."""
    model = peft.get_peft_model(nn.Sequential(base), lamda_config(targets=["0"], **fields))
    perturb(model)
    return model.base_model.model[0]


def parts(layer, name="default"):
    return {
        "lora_A": layer.lora_A[name].weight,
        "core": layer.lora_core[name],
        "lora_B": layer.lora_B[name].weight,
    }


def twin(layer, dropout):
    """A lorafast.Linear with the same tensors."""
    base = layer.base_layer
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    spec = lorafast.LaMDA(
        layer.r["default"],
        layer.lora_alpha["default"],
        dropout,
        layer.use_rslora["default"],
        "repo",
    )
    found = lorafast.Linear(
        weight.shape[1], weight.shape[0], base.bias is not None, spec, dtype=weight.dtype
    )
    with torch.no_grad():
        found.weight.data = (
            weight.detach()
        )  # its strides decide which sums are taken in which order
        if base.bias is not None:
            found.bias.copy_(base.bias)
        for name, part in parts(layer).items():
            getattr(found, name).copy_(part)
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("base", "dtype", "fields"),
    [
        (lambda: nn.Linear(K, N), torch.float32, {}),
        (
            lambda: nn.Linear(13, 7, bias=False),
            torch.float32,
            {"r": 5, "lora_alpha": 3, "use_rslora": True},
        ),
        (lambda: nn.Linear(9, 33), torch.float64, {"r": 1}),
        (lambda: nn.Linear(K, N), torch.bfloat16, {}),
        (lambda: Conv1D(11, 17), torch.float32, {}),
        (lambda: Conv1D(N, K), torch.bfloat16, {"r": 3}),
    ],
)
def test_a_layer_is_lorafasts_own(base, dtype, fields, dropout, calls):
    """The same op on the same tensors and seed: the same bits of y and of every gradient."""
    layer = one_layer(base().to(dtype), lora_dropout=dropout, **fields)
    same = twin(layer, dropout)
    wide = torch.randn(3, 5, same.in_features + 4).to(dtype)
    found = {}
    for name, one, tensors in (
        ("ours", layer, parts(layer)),
        ("twin", same, {n: getattr(same, n) for n in parts(layer)}),
    ):
        x = wide.clone().requires_grad_()
        torch.manual_seed(5)
        y = one(x[..., 1:-3])
        y.float().square().sum().backward()
        found[name] = {"y": y, "x": x.grad} | {n: t.grad for n, t in tensors.items()}
    assert found["ours"].pop("lora_A") is None
    assert found["twin"].pop("lora_A") is None
    assert_same(found["ours"], found["twin"], 0, 0)
    assert (calls["fast"], calls["why"]) == (1, [])


@pytest.mark.parametrize("fast", [True, False])
def test_it_errs_no_more_than_the_chain(fast, monkeypatch):
    """On the op and in plain torch alike."""
    if not fast:
        monkeypatch.setattr(ours.peft_support, "why_not_call", lambda *args: "asked by the test")
    case = testing.Case(testing.Form("lamda", core="full"), 63, N, K, 4, torch.float32, scaling=2.0)
    layer = one_layer(nn.Linear(K, N))
    held = {name: part for name, part in parts(layer).items() if name != "lora_A"}

    def outcome(tensors):
        with torch.no_grad():
            for name, parameter in {
                "weight": layer.weight,
                "bias": layer.bias,
                **parts(layer),
            }.items():
                parameter.copy_(tensors[name])
                parameter.grad = None
        x = tensors["x"].detach().requires_grad_()
        y = layer(x)
        y.backward(tensors["dy"])
        return {"y": y.detach(), "x": x.grad} | {name: part.grad for name, part in held.items()}

    made = [testing.make(case, seed) for seed in range(4)]
    found = testing.Yardstick(case, made, trained=("x", *held)).ratios(outcome)
    assert max(found.values()) <= 2, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [{}, {"svd_niter": 4, "use_rslora": True}, {"lamda_init": "zero"}, {"lamda_init": "repo"}],
    ids=str,
)
def test_it_starts_as_the_base_model(fields, dtype):
    net = Net().to(dtype)
    before = {name: copy.deepcopy(module) for name, module in net.named_children()}
    model = peft.get_peft_model(
        net, lamda_config(ALL, rank_pattern={"down": 2}, alpha_pattern={"up": 3}, **fields)
    )
    for name in ALL:
        layer, base = getattr(net, name), before[name]
        assert layer.r["default"] == (2 if name == "down" else 4)
        assert layer.scaling["default"] == (3 if name == "up" else 8) / layer.r["default"] ** (
            0.5 if "use_rslora" in fields else 1
        )
        weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
        spec = lorafast.LaMDA(
            layer.r["default"],
            layer.lora_alpha["default"],
            rslora="use_rslora" in fields,
            init=fields.get("lamda_init", "residual"),
            svd_niter=fields.get("svd_niter"),
        )
        held = {n.replace("core", "lora_core"): part for n, part in parts(layer).items()}
        assert torch.equal(layer.weight, base.weight) == (spec.init != "residual")
        if spec.init != "repo":
            start = spec.init_tensors(weight.detach())
            for n, value in start.items():
                assert torch.equal(held[n], value.to(dtype).to(held[n].dtype))
            # The residual is of the start, not of what PEFT rounds that to; lorafast.Linear has the
            # same.
            delta = (
                spec.scaling
                * start["lora_B"].double()
                @ start["lora_core"].double()
                @ start["lora_A"].double()
            )
            rest = (weight.double() - delta).to(dtype)
            assert torch.equal(layer.weight, rest.t() if isinstance(base, Conv1D) else rest)
    loose = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    x = X.to(dtype)
    want = before["mixed"](before["down"](torch.relu(before["up"](x))))
    torch.testing.assert_close(model(x), want, rtol=loose, atol=loose)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging(dtype, safe):
    model, x = lamda_model(dtype, targets=ALL), X.to(dtype)
    want, loose = model(x), {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    weights = {name: getattr(model.base_model.model, name).weight.clone() for name in ALL}
    model.merge_adapter(safe_merge=safe)
    for name in ALL:
        layer = getattr(model.base_model.model, name)
        truth = {n: part.double() for n, part in parts(layer).items()}
        delta = 2 * truth["lora_B"] @ truth["core"] @ truth["lora_A"]
        delta = delta.t() if isinstance(layer.base_layer, Conv1D) else delta
        assert torch.equal(layer.weight, (weights[name].double() + delta).to(dtype))
        torch.testing.assert_close(
            layer.get_delta_weight("default").double(), delta, rtol=1e-6, atol=1e-7
        )
    torch.testing.assert_close(model(x), want, rtol=loose, atol=loose)
    model.unmerge_adapter()
    for name in ALL:
        eps = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            getattr(model.base_model.model, name).weight, weights[name], rtol=eps, atol=eps
        )
    plain = model.merge_and_unload(safe_merge=safe)
    assert not [module for module in plain.modules() if isinstance(module, PeftLinear)]
    torch.testing.assert_close(plain(x), want, rtol=loose, atol=loose)


def test_a_broken_adapter_does_not_merge_safely():
    model = lamda_model(targets=["up"])
    layer = model.base_model.model.up
    layer.lora_core["default"].data[0, 0] = torch.inf
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.weight, before)


def test_beside_another_adapter_they_add_up(calls):
    model = lamda_with_another()
    base = model.base_model
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model(X)
        assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n} == {
            n for n, _ in model.named_parameters() if "lora_A.other" in n and name == "other"
        }
    with model.disable_adapter():
        alone["__base__"] = model(X)
    mixed = model(X, adapter_names=["other", "__base__", "default"])
    torch.testing.assert_close(
        mixed, torch.stack([alone[n][i] for i, n in enumerate(("other", "__base__", "default"))])
    )
    base.set_adapter(["default", "other"])
    calls["why"].clear()
    together = model(X)
    assert calls["why"] == ["several active adapters of which one is LaMDA"] * 2
    model.merge_adapter()
    torch.testing.assert_close(model(X), together, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.delete_adapter("other")
    assert torch.allclose(model(X), alone["default"], rtol=1e-5, atol=1e-6)
    model.add_adapter("other", config(r=2))
    model.delete_adapter("default")
    assert {name for name, _ in model.named_parameters() if ".default" in name} == set()
    torch.testing.assert_close(model(X), alone["__base__"])


def test_a_dora_on_the_same_layer_stays_a_dora(calls):
    model = lamda_with_another(targets=ALL, use_dora=True, lora_dropout=0.3)
    model.set_adapter("other")
    want = output_and_gradients(model.train(), X)
    report = lorafast.accelerate(model, keep="recompute")
    assert (report.taken, report.left) == (tuple(f"base_model.model.{name}" for name in ALL), {})
    assert model.base_model.model.up.lorafast_keep == "recompute"
    assert want.keys() == output_and_gradients(model, X).keys()
    model.set_adapter("default")
    found = output_and_gradients(model, X)
    assert lorafast.restore(model) == 0
    assert_same(output_and_gradients(model, X), found, 0, 0)
    assert calls["why"] == []


def test_a_residual_is_taken_once_and_told_of():
    model = lamda_model(targets=["up"])
    weight = model.base_model.model.up.weight
    before = weight.clone()
    with pytest.warns(
        UserWarning, match="adapter 'other' works on the residual weights a LaMDA left"
    ):
        model.add_adapter("other", config(["up"]))
    with pytest.raises(
        ValueError,
        match=r"out of the weight \(40, 24\), on which 'default' and 'other' work: "
        "'zero' and 'repo'",
    ):
        model.add_adapter("late", lamda_config(["up"]))
    assert not [name for name, _ in model.named_parameters() if "late" in name]
    model.delete_adapter("default")
    model.delete_adapter("other")
    again = "which an earlier start has changed: make the model anew"
    with pytest.raises(ValueError, match=again):
        model.add_adapter("late", lamda_config(["up"]))
    plain = model.unload()
    with pytest.raises(ValueError, match=again):
        peft.get_peft_model(plain, lamda_config(["up"]))
    assert plain.up.weight is weight
    assert torch.equal(weight, before)
    tied = nn.ModuleDict({"one": nn.Linear(K, K), "two": nn.Linear(K, K)})
    tied.two.weight = tied.one.weight
    with pytest.raises(ValueError, match=again):
        peft.get_peft_model(tied, lamda_config(["one", "two"]))


def test_layers_that_accelerate_took_take_a_lamda_too(calls):
    model = peft_model()
    want = output_and_gradients(model, X)
    lorafast.accelerate(model)
    model.add_adapter("late", lamda_config(lamda_init="zero"))
    assert_same(output_and_gradients(model, X), want)
    model.set_adapter("late")
    perturb(model)
    found = output_and_gradients(model, X)
    assert calls["why"] == []
    assert lorafast.restore(model) == 0
    assert_same(output_and_gradients(model, X), found, 0, 0)
    model.delete_adapter("late")
    assert lorafast.restore(model) == 2
    with pytest.raises(ValueError, match="Unknown initialization init_lora_weights='lamda_zero'"):
        model.add_adapter("later", lamda_config(lamda_init="zero"))


def test_accelerate_finds_its_own_and_explain_tells(calls):
    model = lamda_model(targets=ALL)
    want, keys = output_and_gradients(model, X), list(model.state_dict())
    assert len(lorafast.accelerate(model).taken) == 3
    assert_same(output_and_gradients(model, X), want, 0, 0)
    rows = lorafast.explain(model).rows
    assert {(row.method, row.saved, row.referenced) for row in rows} == {
        ("LaMDA of PEFT (default)", 4 * 4, ())
    }
    up = model.base_model.model.up
    assert up.lorafast_calls()[0].tensors.core is up.lora_core["default"]
    assert lorafast.restore(model) == 0
    assert list(model.state_dict()) == keys
    assert_same(output_and_gradients(model, X), want, 0, 0)
    kept = testing.saved(lambda: model.base_model.model.up(X), {"x": X}, model.parameters())
    assert kept == testing.Saved(15 * 4 * 4, frozenset())
    assert calls["why"] == []


@pytest.mark.compile
def test_copies_pickles_checkpointing_and_the_compiler(calls):
    model = lamda_model(targets=ALL, lora_dropout=0.2)
    want = output_and_gradients(model, X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for same in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_same(output_and_gradients(same, X), want, 0, 0)
    for reentrant in (False, True):
        again = output_and_gradients(Checkpointed(model, reentrant), X)
        assert_same(
            again, {f"model.{name}" if "." in name else name: value for name, value in want.items()}
        )
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    found = output_and_gradients(compiled, X)
    assert_same(
        {name.removeprefix("_orig_mod."): value for name, value in found.items()},
        output_and_gradients(model, X),
    )
    assert calls["why"] == []


class Checkpointed(nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


def test_an_odd_core_is_not_the_ops_and_dropout_asks_itself():
    layer = lamda_model(targets=["up"], lora_dropout=0.5).base_model.model.up
    layer.training = False
    assert peft_calls.adapter_factors(layer, "default").dropout == 0.5
    layer.lora_core["default"] = nn.Parameter(
        torch.eye(4).to(torch.float8_e4m3fn), requires_grad=False
    )
    assert (
        ours.peft_support.why_not_call(layer, X, (), {}, "both", "inner")
        == "a factor is torch.float8_e4m3fn"
    )


def test_training_moves_the_core_and_B_alone():
    model = lamda_model(targets=ALL, bias="lora_only")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    moved = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert moved == {
        name
        for name in before
        if any(part in name for part in ("lora_B", "lora_core", "base_layer.bias"))
    }
    for on in (False, True):
        model.set_requires_grad("default", on)
        trained = {
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and "lora_" in name
        }
        assert trained == ({name for name in moved if "lora_" in name} if on else set())


def test_a_frozen_half_precision_core_stays_frozen():
    """PEFT's cast to fp32 makes new Parameters of what a ParameterDict holds."""
    model = peft.get_peft_model(Net().bfloat16(), lamda_config(inference_mode=True))
    assert model.base_model.model.up.lora_core["default"].dtype == torch.float32
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_a_transformers_model_takes_it_without_a_peftmodel():
    tiny = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=12, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(tiny).eval()
    tokens = torch.arange(8)[None]
    want = model(tokens).logits
    peft.inject_adapter_in_model(lamda_config(["c_attn", "c_proj"]), model, "mine")
    torch.testing.assert_close(model(tokens).logits, want, rtol=1e-4, atol=1e-5)
    assert len(lorafast.accelerate(model).taken) == 3
    assert {row.method for row in lorafast.explain(model).rows} == {"LaMDA of PEFT (mine)"}
