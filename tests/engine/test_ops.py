"""The ops as torch sees them: opcheck, gradcheck, and what they refuse to differentiate."""

import pytest
import torch
from torch.autograd import forward_ad

import lorafast
from lorafast import DoRA, LaMDA, functional, testing
from lorafast.engine import multi_adapter, reference, row_blocks
from lorafast.engine.problem import CallOptions, GradMask, LayerTensors
from lorafast.testing import FORMS, GRADIENTS, Case

pytestmark = pytest.mark.usefixtures("few_tokens_by_op")

BY_NAME = {form.name: form for form in FORMS}
N, K, R, M = 6, 7, 2, 5


def tensors_of(t, **changes):
    names = {name: t[name] for name in LayerTensors._fields if name in t}
    return LayerTensors(**(names | changes))


def case_and_tensors(form, p=0.0, dtype=torch.float64):
    case = Case(BY_NAME[form], M, N, K, R, dtype, p)
    t = testing.make(case)
    norm = None
    if case.form.magnitude:
        norm = functional.row_norm(
            t["weight"],
            t["lora_A"],
            t["lora_B"],
            t["core"],
            t["out_scale"],
            case.scaling,
            case.form.axis,
        )
    return case, t, tensors_of(t, norm=norm, seed=t["seed"] if p else None)


def settings_of(case, keep):
    return CallOptions(case.scaling, case.dropout, case.form.axis, case.form.dropout_on, keep, 0)


OPCHECKED = [
    ("lora", "none", 0.0),
    ("lamda", "none", 0.3),
    ("vera", "none", 0.3),
    ("dora", "output", 0.3),
    ("dora", "inner", 0.3),
    ("dora", "recompute", 0.0),
    ("dora-both", "inner", 0.3),
    ("dora-in", "none", 0.3),
]


@pytest.mark.parametrize(("form", "keep", "p"), OPCHECKED)
def test_opcheck_linear(form, keep, p):
    case, t, tensors = case_and_tensors(form, p, torch.float32)
    grads = {name for name in GRADIENTS if t[name] is not None}
    tensors = LayerTensors(
        *(
            v.detach().requires_grad_() if name in grads else v
            for name, v in tensors._asdict().items()
        )
    )
    torch.library.opcheck(
        torch.ops.lorafast.linear.default,
        (t["x"].detach().requires_grad_(), *tensors, *settings_of(case, keep)),
    )


@pytest.mark.parametrize(("form", "keep", "p"), OPCHECKED)
def test_opcheck_linear_backward(form, keep, p):
    case, t, tensors = case_and_tensors(form, p, torch.float32)
    y, h, z = torch.ops.lorafast.linear(t["x"], *tensors, *settings_of(case, keep))
    kept = {"output": y, "inner": z}.get(keep)
    wants = [t.get(name) is not None for name in GradMask._fields]
    torch.library.opcheck(
        torch.ops.lorafast.linear_backward.default,
        (t["dy"], t["x"], h, kept, *tensors, *settings_of(case, keep), wants),
    )


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("form", ["dora", "dora-in", "dvora"])
def test_opcheck_row_norm(form, detach):
    case, t, tensors = case_and_tensors(form, dtype=torch.float32)
    tensors = tensors._replace(
        lora_A=t["lora_A"].requires_grad_(), lora_B=t["lora_B"].requires_grad_()
    )
    settings = settings_of(case, "none")
    torch.library.opcheck(torch.ops.lorafast.row_norm.default, (*tensors, *settings, detach, False))
    norm = torch.ops.lorafast.row_norm(*tensors, *settings, True, False)
    wants = list(
        GradMask(
            lora_A=True,
            lora_B=True,
            core=t["core"] is not None,
            out_scale=t["out_scale"] is not None,
        )
    )
    plain = LayerTensors(*(None if v is None else v.detach() for v in tensors))
    torch.library.opcheck(
        torch.ops.lorafast.row_norm_backward.default,
        (torch.randn_like(norm), norm, *plain, *settings, wants),
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("form", [form.name for form in FORMS])
def test_gradcheck(form, p):
    case = Case(BY_NAME[form], M, N, K, R, torch.float64, p)
    if not case.works:
        pytest.skip("keep='output' and a mask on the base term exclude each other")
    t = testing.make(case)
    names = [name for name in GRADIENTS if t[name] is not None]
    norm = None
    if case.form.magnitude and case.form.detach_norm:
        # The norm is a constant of the detached gradient, so it has to be one of the finite
        # differences too.
        norm = functional.row_norm(
            t["weight"],
            t["lora_A"],
            t["lora_B"],
            t["core"],
            t["out_scale"],
            case.scaling,
            case.form.axis,
        )

    def function(*leaves):
        given = t | dict(zip(names, leaves, strict=True))
        if norm is None:
            return testing.ours(case, given)
        f = case.form
        arguments = {name: given[name] for name in (*GRADIENTS, "weight", "seed")}
        return functional.linear(
            **arguments,
            norm=norm,
            axis=f.axis,
            scaling=case.scaling,
            dropout=p,
            dropout_on=f.dropout_on,
            keep=f.keep,
        )

    assert torch.autograd.gradcheck(
        function, [t[name].detach().clone().requires_grad_() for name in names]
    )


def test_the_norm_given_as_a_leaf_gets_its_gradient():
    for form in ("dora-output", "dora-inner", "dora-in"):
        case, t, tensors = case_and_tensors(form, 0.3)

        def function(norm, case=case, t=t):
            f = case.form
            arguments = {name: t[name] for name in (*GRADIENTS, "weight", "seed")}
            return functional.linear(**arguments, norm=norm, axis=f.axis, dropout=0.3, keep=f.keep)

        assert torch.autograd.gradcheck(function, [tensors.norm.clone().requires_grad_()])


def lora(x_grad=True):
    t = testing.make(Case(BY_NAME["lora"], M, N, K, R, torch.float64))
    return {
        name: t[name].detach().requires_grad_(name == "lora_A" or x_grad)
        for name in ("x", "lora_A", "lora_B")
    } | {
        "weight": t["weight"],
        "bias": t["bias"],
    }


def test_double_backward_says_what_to_use():
    t = lora()
    with pytest.raises(RuntimeError, match=r"double backward unsupported, use lorafast\.reference"):
        torch.autograd.grad(lorafast.linear(**t).sum(), t["x"], create_graph=True)
    (first,) = torch.autograd.grad(reference.linear(**t).pow(2).sum(), t["x"], create_graph=True)
    first.sum().backward()
    assert torch.isfinite(t["lora_A"].grad).all()


def test_double_backward_through_the_exact_norm_too():
    t = lora()
    norm = functional.row_norm(t["weight"], t["lora_A"], t["lora_B"], detach=False)
    with pytest.raises(RuntimeError, match=r"double backward unsupported, use lorafast\.reference"):
        torch.autograd.grad(norm.sum(), t["lora_A"], create_graph=True)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_the_exact_norms_gradient_over_many_panels(axis, monkeypatch):
    monkeypatch.setattr(row_blocks, "CPU_ELEMENTS", 2 * K)
    t = lora()
    leaves = [t["lora_A"], t["lora_B"]]
    got = torch.autograd.grad(
        functional.row_norm(t["weight"], *leaves, scaling=0.7, axis=axis, detach=False)
        .pow(3)
        .sum(),
        leaves,
    )
    want = torch.autograd.grad(
        reference.row_norm(t["weight"], *leaves, scaling=0.7, axis=axis).pow(3).sum(), leaves
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("shape", [(R, R), (R,)], ids=["full", "diagonal"])
def test_the_exact_norms_gradient_for_core_and_out_scale(shape, axis):
    t = lora()
    core, out_scale = torch.randn(shape, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    leaves = [
        leaf.detach().requires_grad_() for leaf in (t["lora_A"], t["lora_B"], core, out_scale)
    ]

    def norm(*leaves):
        return functional.row_norm(t["weight"], *leaves, scaling=0.7, axis=axis, detach=False)

    assert torch.autograd.gradcheck(norm, leaves)


def test_vmap_and_forward_ad_say_what_to_use():
    t = lora(x_grad=False)
    weight = {name: value.detach() for name, value in t.items() if name != "x"}

    def function(x):
        return lorafast.linear(x, **weight)

    x = t["x"].detach()
    for transformed in (torch.func.vmap(function), torch.func.grad(lambda x: function(x).sum())):
        with pytest.raises(NotImplementedError, match=r"lorafast\.reference"):
            transformed(x)
    with pytest.raises(NotImplementedError, match=r"lorafast\.reference"):
        torch.func.jvp(function, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"lorafast\.reference"):
        function(forward_ad.make_dual(x, x))
    by_rows = torch.func.vmap(lambda x: reference.linear(x, **weight))(x)
    torch.testing.assert_close(by_rows, function(x))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("adapter", [DoRA(r=2), DoRA(r=2, detach_norm=False), LaMDA(r=2)], ids=repr)
def test_batched_gradients_say_what_to_use(adapter, create_graph):
    layer, x = lorafast.Linear(6, 5, adapter=adapter), torch.randn(3, 6, requires_grad=True)
    given = [x, *(p for p in layer.parameters() if p.requires_grad)]
    with pytest.raises(NotImplementedError, match=r"no batched gradients.*lorafast\.reference"):
        torch.autograd.grad(
            layer(x), given, torch.randn(4, 3, 5), is_grads_batched=True, create_graph=create_graph
        )
    with pytest.raises(NotImplementedError, match=r"lorafast\.reference"):
        torch.autograd.functional.jacobian(layer, x, create_graph=create_graph, vectorize=True)


def test_batched_gradients_of_several_adapters_say_what_to_use():
    x, weight = torch.randn(3, 6, requires_grad=True), torch.randn(5, 6)
    pairs = [multi_adapter.Factors(torch.randn(2, 6), torch.randn(5, 2)) for _ in range(2)]
    y = functional.several(x, weight, None, pairs)
    with pytest.raises(NotImplementedError, match=r"lorafast\.reference"):
        torch.autograd.grad(y, x, torch.randn(4, 3, 5), is_grads_batched=True)


def test_the_bare_op_refuses_what_it_has_no_gradient_for():
    t = lora()
    tensors = LayerTensors(
        t["weight"].clone().requires_grad_(), t["bias"], t["lora_A"], t["lora_B"]
    )
    with pytest.raises(RuntimeError, match="no gradient for weight"):
        torch.ops.lorafast.linear(t["x"], *tensors, *CallOptions())


@pytest.mark.parametrize("form", ["dora-inner", "dora-exact"])
def test_backward_runs_what_forward_fixed_whatever_autocast_is_on(form):
    case, t, _ = case_and_tensors(form, 0.3, torch.float32)
    want = testing.run(testing.ours, case, t)
    leaves = {
        name: None if v is None or name == "seed" else v.detach().requires_grad_(name in GRADIENTS)
        for name, v in t.items()
    }
    y = testing.ours(case, leaves | {"seed": t["seed"]})
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(t["dy"])
    for name in GRADIENTS:
        if t[name] is not None:
            assert torch.equal(leaves[name].grad, want[name])
