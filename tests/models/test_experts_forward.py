"""transformers' experts with adapters: beside PEFT's, and beside a loop over experts in float64."""

import copy

import pytest
import torch
import torch._dynamo.testing as dynamo_testing
from helpers import expert_calls, tiny_experts, tiny_transformers
from helpers.tiny_experts import KINDS, TARGETS
from transformers.integrations import moe

import lorafast
from lorafast import DoRA, LaMDA, LoRA
from lorafast.checkpoint import keys
from lorafast.engine import error_rule, philox
from lorafast.models import experts_forward
from lorafast.models.module_names import adapter_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*now holds the residual")

ADAPTERS = [
    LoRA(r=3, alpha=6, dropout=0.05),
    DoRA(r=3, alpha=6),
    DoRA(r=3, alpha=6, dropout=0.05),
    LaMDA(r=3, init="zero", dropout=0.05),
]


def adapted(make, adapter, dtype=torch.float32, targets=TARGETS):
    """Return a model with an adapter on its experts, away from its start."""
    model = make().to(dtype)
    lorafast.adapt(model, adapter, None, target_parameters=targets, seed=1)
    return tiny_transformers.perturb(model)


def experts_of(model):
    """Return the experts of the first layer that has some."""
    return next(module for module in model.modules() if hasattr(module, "has_gate"))


def trained(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def pair(kind, dtype=torch.float32):
    """Return PEFT's model and lorafast's with equal adapters."""
    theirs = tiny_experts.peft_model(KINDS[kind]().to(dtype))
    own = KINDS[kind]().to(dtype)
    lorafast.adapt(own, LoRA(r=3, alpha=6), None, target_parameters=TARGETS)
    values = {name.replace(".default", ""): value for name, value in theirs.named_parameters()}
    for name, layer in adapter_layers(own).items():
        packed = keys.layer_tensors(name, layer, keys.own_tensors(layer))
        for part, key in zip(keys.own_tensors(layer), packed, strict=True):
            E, rows, columns = getattr(layer, part).shape
            value = values[key].detach()
            if part == "lora_A":
                value = value.reshape(E, rows, columns)
            else:
                value = value.reshape(rows, columns, E).permute(2, 0, 1)
            getattr(layer, part).data.copy_(value)
    return theirs, own


@pytest.mark.peft
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_pefts(kind):
    theirs, own = pair(kind)
    ids = tiny_transformers.IDS
    outputs = []
    for model in (theirs, own):
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        outputs.append(logits)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    expected = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters() if parameter.requires_grad
    }  # fmt: skip
    found = {}
    for name, layer in adapter_layers(own).items():
        grads = {part: parameter.grad for part, parameter in keys.own_tensors(layer).items()}
        found |= keys.layer_tensors(name, layer, grads)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert expected[name].any(), name
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.peft
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_errs_at_most_twice_what_peft_errs(kind):
    theirs, own = pair(kind, torch.bfloat16)
    wide = copy.deepcopy(own).double()
    wrapper = next(m for m in theirs.modules() if type(m).__name__ == "ParamWrapper")
    made = expert_calls.call(experts_of(own), torch.bfloat16)
    own_results = [
        expert_calls.results(experts, made, []) for experts in (experts_of(own), wrapper)
    ]
    wide_call = expert_calls.call(experts_of(own), torch.float64)
    truth = expert_calls.results(experts_of(wide), wide_call, [])
    found, chain = ([one.double() for one in results] for results in own_results)
    comparison = error_rule.compare(lambda: found, truth, chain, torch.bfloat16)
    assert not comparison.why_wrong


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        pytest.param(kind, adapter, marks=[pytest.mark.slow] * (i % 3 > 0))
        for i, (kind, adapter) in enumerate((k, a) for k in KINDS for a in ADAPTERS)
    ],
)
def test_against_a_loop_over_experts(kind, adapter, dtype):
    own = adapted(KINDS[kind], adapter, dtype).train()
    wide = copy.deepcopy(own).double()
    parameters = [trained(experts_of(model)) for model in (own, wide)]
    layers = [list(experts_of(model)._lorafast.values()) for model in (own, wide)]
    made, wide_call = (expert_calls.call(experts_of(own), d) for d in (dtype, torch.float64))
    torch.manual_seed(5)
    seeds = [philox.draw_seed("cpu") for _ in range(2)] if adapter.dropout else (None, None)

    def by_loop(model, given, its_layers, its_parameters):
        def forward(*_):
            return expert_calls.loop(experts_of(model), its_layers, given, seeds)

        return expert_calls.results(forward, given, its_parameters)

    def run():
        torch.manual_seed(5)
        results = expert_calls.results(experts_of(own), made, parameters[0])
        return [one.double() for one in results]

    truth = by_loop(wide, wide_call, layers[1], parameters[1])
    found = run()
    # The expert without a token has gradients of zero.
    assert all(not grad[1].any() for grad in found[3:])
    if dtype == torch.bfloat16:
        chain = [one.double() for one in by_loop(own, made, layers[0], parameters[0])]
        assert not error_rule.compare(run, truth, chain, dtype).why_wrong
        return
    bound = 1e-10 if dtype == torch.float64 else 1e-5
    for one, expected in zip(found, truth, strict=True):
        scale = expected.abs().max().clamp(min=1)
        torch.testing.assert_close(one / scale, expected / scale, rtol=bound, atol=bound)


def test_experts_without_a_gate():
    model = tiny_experts.nemotron_h()
    before = tiny_transformers.outputs(model)
    targets = ["experts.up_proj", "experts.down_proj"]
    lorafast.adapt(model, DoRA(r=3), None, target_parameters=targets)
    torch.testing.assert_close(tiny_transformers.outputs(model), before, rtol=1e-5, atol=1e-5)
    model = tiny_transformers.perturb(model)
    after = tiny_transformers.outputs(model)
    assert (after - before).abs().max() > 1e-3
    merged = lorafast.merge(model)
    torch.testing.assert_close(tiny_transformers.outputs(merged), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_one_projection_alone(target):
    model = adapted(KINDS["gpt_oss"], LoRA(r=3), targets=[target])
    assert len(adapter_layers(model)) == 2
    after = tiny_transformers.outputs(model)
    assert (after - tiny_transformers.outputs(KINDS["gpt_oss"]())).abs().max() > 1e-3
    lorafast.merge(model)
    torch.testing.assert_close(tiny_transformers.outputs(model), after, rtol=1e-5, atol=1e-5)


def test_routing_sorts_by_expert():
    index = torch.tensor([[3, 0], [0, 2], [3, 2]])
    groups, tokens = experts_forward.route(index, 5)
    assert groups.offsets.tolist() == [0, 2, 2, 4, 6, 6]
    assert groups.offsets.dtype == torch.int32
    assert groups.rows.tolist() == [1, 2, 3, 5, 0, 4]
    assert tokens.tolist() == [0, 1, 1, 2, 0, 2]


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the operations that read a value on the host."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        if any(part in name for part in ("_local_scalar_dense", "nonzero", "unique")):
            self.read.append(name)
        return operation(*args, **kwargs or {})


def test_routing_reads_nothing_on_the_host():
    with _Recorder() as recorder:
        experts_forward.route(torch.tensor([[3, 0], [0, 2]]), 5)
    assert not recorder.read


def test_autocast_and_other_dtypes_of_tokens():
    model = adapted(KINDS["qwen3_moe"], LoRA(r=3))
    made = expert_calls.call(experts_of(model), torch.float32)
    plain = experts_of(model)(*made[:3])
    with torch.autocast("cpu", torch.bfloat16):
        y = experts_of(model)(*made[:3])
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, plain, rtol=0.05, atol=0.05)
    half = adapted(KINDS["qwen3_moe"], LoRA(r=3), torch.bfloat16)
    y = experts_of(half)(*made[:3])
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, plain, rtol=0.1, atol=0.1)


def test_the_registry_serves_experts_without_adapters():
    model = KINDS["olmoe"]()
    before = tiny_transformers.outputs(model)
    model.set_experts_implementation("lorafast")
    torch.testing.assert_close(tiny_transformers.outputs(model), before, rtol=1e-5, atol=1e-5)
    model = tiny_transformers.perturb(
        lorafast.adapt(model, LoRA(r=3), None, target_parameters=TARGETS)
    )
    after = tiny_transformers.outputs(model)
    model.set_experts_implementation("eager")
    assert torch.equal(tiny_transformers.outputs(model), after)
    with lorafast.disable_adapter(model):
        torch.testing.assert_close(tiny_transformers.outputs(model), before, rtol=1e-5, atol=1e-5)


def test_disabled_experts_run_the_models_own_implementation(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return moe.grouped_mm_experts_forward(*args)

    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._local_mapping, "counted", counted)
    model = KINDS["qwen3_moe"]()
    model.set_experts_implementation("counted")
    lorafast.adapt(model, LoRA(r=3), None, target_parameters=TARGETS)
    tiny_transformers.outputs(model)
    assert not calls
    with lorafast.disable_adapter(model):
        tiny_transformers.outputs(model)
    assert len(calls) == 2
    with lorafast.merged(model):
        tiny_transformers.outputs(model)
    assert len(calls) == 4
    one = adapter_layers(model)["model.layers.0.mlp.experts.down_proj"]
    one.disable()
    tiny_transformers.outputs(model)
    assert len(calls) == 4


@pytest.mark.slow
@pytest.mark.compile
def test_compiled_experts_do_not_recompile_for_another_routing():
    model = adapted(KINDS["qwen3_moe"], LoRA(r=3))
    experts = experts_of(model)
    counter = dynamo_testing.CompileCounter()
    compiled = torch.compile(experts, fullgraph=True, backend=counter)
    for unused in ((1,), (0, 4), ()):
        made = expert_calls.call(experts, torch.float32, unused)
        expected = expert_calls.results(experts, made, trained(experts))
        found = expert_calls.results(compiled, made, trained(experts))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
