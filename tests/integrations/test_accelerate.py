"""lorafast.accelerate: PEFT's layers give PEFT's results, and all that PEFT does still works."""

import copy
import io
import json
import os

import peft
import pytest
import torch
from helpers import tiny_transformers
from helpers.peft_models import (
    TARGETS,
    K,
    N,
    Net,
    X,
    add_second_adapter,
    assert_same,
    config,
    output_and_gradients,
    peft_model,
)
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from torch.multiprocessing import spawn
from torch.utils.checkpoint import checkpoint

import lorafast
from lorafast import testing
from lorafast.engine import formula, philox
from lorafast.integrations import peft_linear as ours

pytestmark = [pytest.mark.peft, pytest.mark.usefixtures("few_tokens_by_op")]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True, "targets": ["up"]},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {"up": 2}, "alpha_pattern": {"down": 3}},
        {"targets": ["mixed"], "fan_in_fan_out": True},
        {"targets": ["mixed"], "fan_in_fan_out": True, "use_dora": True},
        {"use_dora": True, "lora_dropout": 0.3, "mode": False},
        {"lora_dropout": 0.3, "mode": False},
    ],
    ids=str,
)
def test_results_are_pefts_and_nothing_else_changes(fields, calls):
    fields = dict(fields)
    mode = fields.pop("mode", True)
    model = peft_model(**fields).train(mode)
    want, parameters, keys = (
        output_and_gradients(model, X),
        dict(model.named_parameters()),
        list(model.state_dict()),
    )
    printed = repr(model)
    report = lorafast.accelerate(model)
    assert report.left == {}
    assert len(report.taken) == len(fields.get("targets", TARGETS))
    assert_same(output_and_gradients(model, X), want)
    assert (calls["fast"], calls["why"]) == (len(report.taken), [])
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert repr(model) == printed
    assert lorafast.restore(model) == len(report.taken)
    assert not [
        module for module in model.modules() if isinstance(module, ours.Linear | ours.LoraModel)
    ]
    assert_same(output_and_gradients(model, X), want, 0, 0)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_a_fresh_adapter_is_the_base_model_bit_for_bit(fields, calls):
    model = Net()
    want = model(X)
    model = peft.get_peft_model(model, config(**fields))
    lorafast.accelerate(model)
    assert torch.equal(model(X), want)
    assert calls["fast"] == 2


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout_on", [None, "adapter"])
def test_dropout_is_pefts_reading_unless_asked_otherwise(dora, dropout_on, calls):
    p = 0.5
    model = peft_model(targets=["up"], use_dora=dora, lora_dropout=p)
    lorafast.accelerate(model, dropout_on=dropout_on)
    (layer,) = [m for m in model.modules() if isinstance(m, ours.Linear)]
    form = (
        testing.Form("dora", magnitude=True, dropout_on=dropout_on or "both")
        if dora
        else testing.Form("lora")
    )
    case = testing.Case(form, 15, N, K, 4, torch.float32, p, True, 2.0)
    x = X.flatten(0, 1)
    torch.manual_seed(11)
    y = layer(x)
    torch.manual_seed(11)
    seed = philox.draw_seed(x.device)
    tensors = {name: None for name in ("core", "out_scale", "lora_bias", "magnitude")}
    tensors |= {"x": x, "weight": layer.weight, "bias": layer.bias, "seed": seed}
    tensors |= {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    if dora:
        tensors["magnitude"] = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(y, testing.chain(case, tensors), rtol=1e-5, atol=1e-5)
    assert calls["fast"] == 1


@pytest.mark.parametrize("grad_scale", [1.0, 2.0**-20])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_base_keeps_no_wide_copy_of_x_and_errs_little(
    dtype, dora, grad_scale, calls
):
    # Small gradients on fp16 are what PEFT's own products, all fp32, do not lose either.
    model = peft_model(dtype, targets=["up"], use_dora=dora)
    lorafast.accelerate(model)
    (layer,) = [m for m in model.modules() if isinstance(m, ours.Linear)]
    form = (
        testing.Form("dora", magnitude=True, dropout_on="both", keep="inner")
        if dora
        else testing.Form("lora")
    )
    case = testing.Case(
        form, 63, N, K, 4, dtype, 0.0, True, 2.0, torch.float32, grad_scale=grad_scale
    )
    names = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    assert {p.dtype for p in names.values()} == {torch.float32}
    if dora:
        names["magnitude"] = layer.lora_magnitude_vector["default"].weight
    made = [testing.make(case, seed) for seed in range(4)]

    def outcome(tensors):
        with torch.no_grad():
            layer.weight.copy_(tensors["weight"])
            layer.bias.copy_(tensors["bias"])
            for name, parameter in names.items():
                parameter.copy_(tensors[name])
                parameter.grad = None
        x = tensors["x"].detach().requires_grad_()
        y = layer(x)
        y.backward(tensors["dy"])
        return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in names.items()}

    found = testing.Yardstick(case, made, trained=("x", *names)).ratios(outcome)
    assert max(found.values()) <= 2, found
    assert (calls["fast"], calls["why"]) == (4, [])
    x = torch.randn(63, K, dtype=dtype, requires_grad=True)
    kept = testing.saved(lambda: layer(x), {"x": x}, layer.parameters())
    assert kept.referenced == {"x"}
    assert kept.own == 63 * 4 * 2 + dora * (63 * N * 2 + N * 4)


@pytest.mark.parametrize("several", [False, True])
def test_an_exported_model_has_torchs_ops_alone(several):
    model = peft_model()
    if several:
        add_second_adapter(model)
        model.base_model.set_adapter(["default", "other"])
    lorafast.accelerate(model)
    program = torch.export.export(model.eval(), (X,))
    ops = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert ops
    assert not [op for op in ops if "lorafast" in str(op)]
    assert_same({"y": program.module()(X)}, {"y": model(X)})


def test_several_active_adapters_share_a_call(calls):
    model = peft_model()
    add_second_adapter(model)
    model.base_model.set_adapter(["default", "other"])
    want = output_and_gradients(model, X)
    lorafast.accelerate(model)
    assert_same(output_and_gradients(model, X), want)
    assert (calls["fast"], calls["why"]) == (2, [])
    text = str(lorafast.explain(model))
    assert "LoRA of PEFT (default)" in text
    assert "LoRA of PEFT (other)" in text


def test_adapters_of_later_are_covered_on_old_and_new_modules(calls):
    model = peft_model(targets=["up"])
    lorafast.accelerate(model, keep="recompute")
    model.add_adapter("other", config(targets=["up", "down"], use_dora=True))
    model.set_adapter("other")
    layers = [m for m in model.modules() if isinstance(m, PeftLinear)]
    assert [type(m) for m in layers] == [ours.Linear] * 2
    assert {m.lorafast_keep for m in layers} == {"recompute"}
    found = output_and_gradients(model, X)
    assert (calls["fast"], calls["why"]) == (2, [])
    lorafast.restore(model)
    assert_same(found, output_and_gradients(model, X))
    model.delete_adapter("other")
    model.set_adapter("default")
    lorafast.accelerate(model)
    assert_same(output_and_gradients(model, X), output_and_gradients(model, X))


def test_what_peft_does_with_adapters_goes_on_working():
    model, twin = peft_model(), peft_model()
    for one in (model, twin):
        add_second_adapter(one)
    lorafast.accelerate(model)

    def both(action):
        torch.testing.assert_close(action(model), action(twin), rtol=1e-4, atol=1e-5)

    def disabled(one):
        with one.disable_adapter():
            return one(X)

    def merged(one):
        one.merge_adapter()
        y = one(X)
        one.unmerge_adapter()
        return torch.stack([y, one(X)])

    def switched(one):
        one.set_adapter("other")
        return one(X)

    def named(one):
        return one.eval()(X, adapter_names=["default", "other", "__base__"])

    def weighted(one):
        one.add_weighted_adapter(["default", "other"], [0.3, 0.7], "mix", combination_type="svd")
        one.set_adapter("mix")
        return one(X)

    def unloaded(one):
        return one.merge_and_unload()(X)

    for action in (disabled, merged, switched, named, weighted, unloaded):
        both(action)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_its_dtype(dtype, calls):
    model = peft_model(use_dora=True)
    lorafast.accelerate(model)
    with torch.autocast("cpu", dtype):
        y = model.base_model.model.up(X)
        assert y.dtype == dtype
    torch.testing.assert_close(y.float(), model.base_model.model.up(X), rtol=3e-2, atol=3e-2)
    assert calls["why"] == []


def test_a_hot_swapped_scaling_is_a_tensor_and_the_rank_is_the_weights(calls):
    model = peft_model()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    want = output_and_gradients(model, X)
    lorafast.accelerate(model)
    assert isinstance(model.base_model.model.up.scaling["default"], torch.Tensor)
    assert_same(output_and_gradients(model, X), want)
    assert (calls["fast"], calls["why"]) == (2, [])


@pytest.mark.compile
@pytest.mark.parametrize(
    "fields", [{}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.2}], ids=str
)
def test_it_compiles_whole(fields):
    model = peft_model(**fields)
    lorafast.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(
        {n.removeprefix("_orig_mod."): g for n, g in output_and_gradients(compiled, X).items()},
        output_and_gradients(model, X),
    )
    model.eval()
    with model.disable_adapter():
        torch.testing.assert_close(compiled(X), model(X))


@pytest.mark.compile
def test_wrapped_models_are_looked_into():
    model = torch.compile(peft_model(), backend="eager")
    assert len(lorafast.accelerate(model).taken) == 2
    assert lorafast.restore(nn.Sequential(model)) == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_a_model_inside_ddp_is_taken(tmp_path):
    spawn(_step_in_a_group, args=(str(tmp_path / "meeting"),), nprocs=1)


def _step_in_a_group(rank, meeting):
    model = peft_model(use_dora=True)
    want = output_and_gradients(model, X)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=1
    )
    parallel = nn.parallel.DistributedDataParallel(model)
    assert len(lorafast.accelerate(parallel).taken) == 2
    assert_same(
        {
            name.removeprefix("module."): value
            for name, value in output_and_gradients(parallel, X).items()
        },
        want,
    )
    # A process of its own, left without ado: gloo's threads may wait for the interpreter that waits
    # for them.
    os._exit(0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_mask_again(reentrant, calls):
    model = peft_model(use_dora=True, lora_dropout=0.3)
    lorafast.accelerate(model)
    want = output_and_gradients(model, X)
    assert_same(
        output_and_gradients(Checkpointed(model, reentrant), X),
        {f"model.{n}" if "." in n else n: g for n, g in want.items()},
    )
    assert (calls["fast"], calls["why"]) == (6, [])


class Checkpointed(nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


def test_a_model_without_peftmodel_is_taken_too(calls):
    model = peft.inject_adapter_in_model(config(), Net())
    assert lorafast.accelerate(model).taken == ("up", "down")
    model(X)
    assert calls["fast"] == 2


def test_copies_pickles_and_checkpoints(tmp_path, calls):
    model = peft_model(use_dora=True, lora_dropout=0.1)
    model.save_pretrained(tmp_path / "before")
    lorafast.accelerate(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    assert json.loads((tmp_path / "after" / "adapter_config.json").read_text())["use_dora"]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_same(output_and_gradients(twin, X), output_and_gradients(model, X), 0, 0)
    loaded = peft.PeftModel.from_pretrained(peft_model().unload(), tmp_path / "after")
    lorafast.accelerate(loaded)
    torch.testing.assert_close(loaded.eval()(X), model.eval()(X))
    assert calls["why"] == []


def test_patch_peft_leaves_a_wrapped_parameter_to_peft():
    """PEFT's wrapper of a bare Parameter borrows a method of whatever class lora.Linear is."""
    fields = {"targets": [], "target_parameters": ["up.weight"]}
    want = peft_model(**fields)(X)
    with lorafast.patch_peft():
        torch.testing.assert_close(peft_model(**fields)(X), want)


def test_patch_peft_serves_what_is_built_inside(calls):
    with lorafast.patch_peft():
        model = peft_model(use_dora=True)
    assert {type(m) for m in model.modules() if isinstance(m, PeftLinear)} == {ours.Linear}
    found = output_and_gradients(model, X)
    assert (calls["fast"], calls["why"]) == (2, [])
    assert_same(found, output_and_gradients(peft_model(use_dora=True), X))
    assert {type(m) for m in peft_model().modules() if isinstance(m, PeftLinear)} == {PeftLinear}
    with pytest.raises(KeyError), lorafast.patch_peft():
        raise KeyError
    assert {type(m) for m in peft_model().modules() if isinstance(m, PeftLinear)} == {PeftLinear}
    assert lorafast.restore(model) == 2


def test_what_is_no_model_with_adapters_is_refused():
    with pytest.raises(
        TypeError, match=r"model must be a torch\.nn.Module with PEFT adapters, not str"
    ):
        lorafast.accelerate("model")
    with pytest.raises(TypeError, match="not int"):
        lorafast.restore(3)
    with pytest.raises(ValueError, match=r"Net carries no PEFT adapter.*lorafast\.adapt"):
        lorafast.accelerate(Net())
    with pytest.raises(ValueError, match="dropout_on='all'"):
        lorafast.accelerate(peft_model(), dropout_on="all")
    assert lorafast.restore(peft_model()) == 0


def test_a_model_of_which_nothing_can_be_taken_gets_a_report_and_runs_as_before():
    fields = {"target_modules": ["up"], "feedforward_modules": []}
    model = peft.get_peft_model(Net(), peft.IA3Config(**fields))
    before = output_and_gradients(model, X)
    with pytest.warns(UserWarning, match=r"0 of 1 PEFT layers.*left 1: is a peft\.tuners\.ia3"):
        report = lorafast.accelerate(model)
    assert report.taken == ()
    assert list(report.left) == ["base_model.model.up"]
    assert_same(output_and_gradients(model, X), before, 0, 0)
    assert lorafast.restore(model) == 0


def test_a_peft_model_without_layers_is_told_so():
    model = peft.get_peft_model(
        tiny_transformers.llama(),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    with pytest.warns(UserWarning, match="0 of 0 PEFT layers run on lorafast"):
        report = lorafast.accelerate(model)
    assert (report.taken, report.left) == ((), {})


def test_keep_output_steps_aside_where_it_cannot_serve():
    model = peft_model(targets=["up"], use_dora=True, lora_dropout=0.1)
    with pytest.warns(UserWarning, match="left 1: keep='output' cannot serve dropout_on='both'"):
        assert lorafast.accelerate(model, keep="output").taken == ()
    assert lorafast.accelerate(model, dropout_on="adapter", keep="output").left == {}
    assert "keep='output'" in str(lorafast.explain(model))
    lorafast.accelerate(model)
    assert "a second base GEMM" in str(lorafast.explain(model))
    lora = peft_model(targets=["up"], lora_dropout=0.1)
    lorafast.accelerate(lora, keep="output")
    assert lora(X).isfinite().all()


def test_the_cache_of_doras_norm_is_pefts_switch_and_forgets_when_pefts_does(
    monkeypatch, calls_by_python
):
    model = peft_model(targets=["up"], use_dora=True).eval()
    lorafast.accelerate(model)
    seen, right = [], formula.row_norm

    def row_norm(*args):
        seen.append(1)
        return right(*args)

    monkeypatch.setattr(formula, "row_norm", row_norm)
    model(X)
    model(X)
    assert len(seen) == 2
    with peft.helpers.DoraCaching():
        first = model(X)
        assert torch.equal(model(X), first)
        assert len(seen) == 3
        model.base_model.model.up.lora_B["default"].weight.data.mul_(3)
        model.train().eval()
        again = model(X)
        assert len(seen) == 4
        model.train()(X)
        assert len(seen) == 5
    model.eval()
    torch.testing.assert_close(model(X), again)
