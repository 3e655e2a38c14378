"""accelerate on PEFT's wrappers of experts' Parameters: the same results, names and files."""

import copy

import peft
import pytest
import torch
from helpers import expert_calls, tiny_experts, tiny_transformers
from helpers.tiny_experts import KINDS, TARGETS
from helpers.tiny_transformers import copied_tensors, loaded_by_peft, outputs, perturb
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch import nn

import lorafast
from lorafast.engine import error_rule
from lorafast.integrations import peft_experts

pytestmark = [
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore:accelerate. "),
    pytest.mark.filterwarnings("ignore:base_model_name_or_path is null"),
]


@pytest.fixture
def reasons(monkeypatch):
    """The reasons of the calls that run PEFT's own forward."""
    found = []
    real = peft_experts.peft_forward
    monkeypatch.setattr(
        peft_experts,
        "peft_forward",
        lambda layer, why, *args, **kwargs: found.append(why) or real(layer, why, *args, **kwargs),
    )
    return found


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, PeftParamWrapper)]


def close(first, second):
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def trained(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_stay_pefts(kind, reasons):
    model = tiny_experts.peft_model(KINDS[kind]())
    names, ids = copied_tensors(model).keys(), tiny_transformers.IDS

    def step():
        logits = model(input_ids=ids).logits
        grads = torch.autograd.grad(logits.square().mean(), trained(model))
        return [logits, *grads]

    expected = step()
    report = lorafast.accelerate(model)
    assert len(report.taken) == 4
    assert not report.left
    found = step()
    assert not reasons
    for one, other in zip(found, expected, strict=True):
        assert other.any()
        close(one, other)
    assert names == copied_tensors(model).keys()
    assert lorafast.restore(model) == 4
    assert all(torch.equal(one, other) for one, other in zip(step(), expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_errs_at_most_twice_what_peft_errs(kind, reasons):
    model = tiny_experts.peft_model(KINDS[kind]().bfloat16())
    wide, ours = copy.deepcopy(model).double(), copy.deepcopy(model)
    wide.get_base_model().set_experts_implementation("eager")
    lorafast.accelerate(ours)
    experts = wrappers(model)[0].get_base_layer()

    def run(one, dtype):
        wrapper = wrappers(one)[0]
        made = expert_calls.call(experts, dtype)
        results = expert_calls.results(wrapper, made, trained(wrapper))
        return [result.double() for result in results]

    truth, chain = run(wide, torch.float64), run(model, torch.bfloat16)
    comparison = error_rule.compare(lambda: run(ours, torch.bfloat16), truth, chain, torch.bfloat16)
    assert not comparison.why_wrong
    assert not reasons


def test_experts_without_tokens_get_gradients_of_zero():
    model = tiny_experts.peft_model(KINDS["qwen3_moe"]())
    lorafast.accelerate(model)
    wrapper = wrappers(model)[0]
    made = expert_calls.call(wrapper.get_base_layer(), torch.float32, unused=(1, 4))
    wrapper(*made[:3]).sum().backward()
    for one in wrappers(model)[:2]:
        A, B = one.lora_A["default"].weight, one.lora_B["default"].weight
        A, B = A.grad.view(6, 3, -1), B.grad.view(B.shape[0], 3, 6)
        assert not A[[1, 4]].any()
        assert not B[..., [1, 4]].any()
        assert A[0].any()
        assert B[..., 0].any()


def test_what_is_kept_for_backward():
    model = tiny_experts.peft_model(KINDS["qwen3_moe"]())
    lorafast.accelerate(model)
    wrapper = wrappers(model)[0]
    made = expert_calls.call(wrapper.get_base_layer(), torch.float32)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.data_ptr(), tensor.shape] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = wrapper(*made[:3])
    y.sum().backward()
    smallest = min(wrapper.get_param().numel() for wrapper in wrappers(model))
    assert kept
    assert all(tensor.numel() < smallest for tensor in kept.values())


def test_files_and_merging_stay_pefts(tmp_path):
    model = tiny_experts.peft_model(KINDS["gpt_oss"]())
    expected = outputs(model)
    lorafast.accelerate(model)
    model.save_pretrained(tmp_path)
    close(outputs(loaded_by_peft(KINDS["gpt_oss"](), tmp_path)), expected)
    with lorafast.merged(model):
        close(outputs(model), expected)
    model.merge_adapter()
    close(outputs(model), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        close(outputs(model), outputs(KINDS["gpt_oss"]()))
    close(outputs(model.merge_and_unload()), expected)


def test_patch_peft_and_later_adapters():
    with lorafast.patch_peft():
        model = tiny_experts.peft_model(KINDS["mixtral"]())
    assert all(type(one) is peft_experts.ParamWrapper for one in wrappers(model))
    expected = outputs(model)
    lorafast.restore(model)
    close(outputs(model), expected)
    lorafast.accelerate(model)
    model.add_adapter("second", peft.LoraConfig(
        r=2, target_modules=[], target_parameters=TARGETS, init_lora_weights=False
    ))  # fmt: skip
    model.set_adapter("second")
    other = outputs(model)
    assert (other - expected).abs().max() > 1e-4
    lorafast.restore(model)
    close(outputs(model), other)


def test_explain():
    model = tiny_experts.peft_model(KINDS["qwen3_moe"]())
    lorafast.accelerate(model)
    rows = lorafast.explain(model).rows
    assert {row.shape for row in rows} == {(32, 16), (32, 32)}
    assert {row.saved for row in rows} == {4 * 3}
    assert {row.method for row in rows} == {"LoRA of PEFT (default)"}


def test_one_parameter_and_layers_beside_experts(reasons):
    model = tiny_experts.peft_model(
        KINDS["qwen3_moe"](), target_parameters=TARGETS[:1], target_modules=["q_proj"]
    )
    expected = outputs(model)
    assert len(lorafast.accelerate(model).taken) == 4
    close(outputs(model), expected)
    assert not reasons


def test_calls_that_stay_pefts(reasons):
    model = tiny_experts.peft_model(KINDS["qwen3_moe"]())
    expected = outputs(model)
    lorafast.accelerate(model)
    wrapper = wrappers(model)[0]
    experts = wrapper.get_base_layer()
    made = expert_calls.call(experts, torch.float32)
    y = wrapper(*made[:3])
    close(wrapper(made.x, made.index, top_k_weights=made.weights), y)
    assert reasons.pop(0).startswith("is called with other arguments")
    # The inner wrapper is called within the outer one's parametrization.
    assert "parametrized, by an outer wrapper" in reasons.pop(0)
    handle = experts.register_forward_hook(lambda *_: None)
    close(outputs(model), expected)
    # Those of the layer with the hook: of the outer wrapper, and of the inner one within it.
    outer, inner = reasons
    assert outer == "its module of experts has hooks"
    assert "parametrized" in inner
    handle.remove()
    reasons.clear()
    with model.disable_adapter():
        outputs(model)
    assert set(reasons) == {"the adapters are disabled"}


class OwnExperts(nn.Module):
    """Experts that transformers' registry does not know."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        return torch.einsum("mk,ekn->men", x, self.weight)


def left(model):
    """Return the reasons why accelerate leaves wrappers to PEFT, and check that nothing changes."""
    with torch.no_grad():
        report = lorafast.accelerate(model)
    return set(report.left.values())


def test_wrappers_that_stay_pefts():
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    own = perturb(peft.get_peft_model(nn.Sequential(OwnExperts()), config))
    x = torch.randn(6, 4)
    expected = own(x)
    (why,) = left(own)
    assert "does not go by transformers' registry" in why
    assert torch.equal(own(x), expected)
    router = tiny_experts.peft_model(KINDS["mixtral"](), target_parameters=["mlp.gate.weight"])
    expected = outputs(router)
    (why,) = left(router)
    assert "MixtralTopKRouter" in why
    assert torch.equal(outputs(router), expected)


def test_several_adapters_and_other_states_stay_pefts(reasons):
    model = tiny_experts.peft_model(KINDS["qwen3_moe"]())
    model.add_adapter("second", peft.LoraConfig(
        r=2, target_modules=[], target_parameters=TARGETS, init_lora_weights=False
    ))  # fmt: skip
    model.base_model.set_adapter(["default", "second"])
    expected = outputs(model)
    assert left(model) == {"several active adapters on one Parameter of experts"}
    close(outputs(model), expected)
    assert "several active adapters" in reasons[0]
    model.base_model.set_adapter("default")
    experts = wrappers(model)[0].get_base_layer()
    for change, why in (
        ({"_is_expert_parallel": True}, "expert parallelism"),
        ({"forward": experts.forward}, "its module of experts has a forward of its own"),
    ):
        before = {name: vars(experts).get(name) for name in change}
        vars(experts).update(change)
        assert any(why in one for one in left(model))
        for name, value in before.items():
            vars(experts).pop(name) if value is None else vars(experts).update({name: value})
    experts.down_proj.requires_grad_(True)
    assert any("its Parameter down_proj trains" in one for one in left(model))


@pytest.mark.slow
@pytest.mark.compile
def test_a_compiled_wrapper():
    model = tiny_experts.peft_model(KINDS["gpt_oss"]())
    lorafast.accelerate(model)
    wrapper = wrappers(model)[0]
    made = expert_calls.call(wrapper.get_base_layer(), torch.float32)
    expected = expert_calls.results(wrapper, made, trained(wrapper))
    compiled = torch.compile(wrapper, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        expert_calls.results(compiled, made, trained(wrapper)), expected, strict=True
    ):
        close(one, other)
