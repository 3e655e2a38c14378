"""The host path in C++ against the Python path: the same bits, saved tensors and words."""

import copy
import itertools
import threading

import pytest
import torch
from helpers.cpp_compiler import needs_compiler
from helpers.rotations import rotating

import lorafast
from lorafast import testing
from lorafast.engine import dispatch, half_products, host
from lorafast.testing import FORMS, Case

pytestmark = needs_compiler
SHAPES = ((7, 24, 40, 3), (1, 33, 17, 1), (64, 130, 96, 16), (0, 8, 16, 2), (300, 65, 257, 40))
TURNS = tuple(itertools.product((0.0, 0.2), (True, False), (False, True)))


@pytest.fixture
def served(monkeypatch):
    """A list with an entry for every call of the host path: True if it served."""
    calls, linear = [], ready()

    def counted(*args):
        y = linear(*args)
        calls.append(y is not None)
        return y

    monkeypatch.setattr(host, "linear", counted)
    return calls


def ready():
    """The function of the C++ module, built and loaded if need be."""
    layer = lorafast.Linear(4, 4)
    layer(torch.randn(2, 4))
    if not host.is_ready():
        pytest.skip("the host path cannot be built here")
    return host.linear


@pytest.fixture
def by_python(monkeypatch):
    """A function that keeps all later calls in Python, on the op."""
    from lorafast.engine import plain_products

    def turn():
        monkeypatch.setattr(host, "linear", host._declined)
        monkeypatch.setattr(plain_products, "MOST_ELEMENTS", -1)
        monkeypatch.setattr(plain_products, "MOST_ELEMENTS_COPIED", -1)

    return turn


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if value is None:
            assert ours[name] is None, name
        else:
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    ("form", "dtype", "shape", "p", "bias", "transposed"),
    [
        (form, dtype, shape, *turn)
        for ((form, dtype), turn), shape in zip(
            rotating(
                itertools.product(FORMS, (torch.float32, torch.bfloat16, torch.float16)),
                TURNS,
                3,
                3,
            ),
            itertools.cycle(SHAPES),
            strict=False,
        )
    ],
    ids=lambda value: str(getattr(value, "name", value)).removeprefix("torch."),
)
def test_the_bits_are_those_of_python(form, dtype, shape, p, bias, transposed, served, by_python):
    case = Case(form, *shape, dtype, p, bias, transposed=transposed)
    if not case.works:
        pytest.skip("these words exclude each other")
    tensors = testing.make(case)
    ours = testing.run(testing.ours, case, tensors)
    assert served == [True]
    by_python()
    assert_same_bits(ours, testing.run(testing.ours, case, tensors))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_base_products_by_panels(dtype, transposed, served, by_python, monkeypatch):
    """Where torch has no quick product in half precision, whatever the processor here."""
    monkeypatch.setattr(half_products, "torch_is_slow", lambda dtype: dtype.itemsize == 2)
    case = Case(FORMS[0], 40, 65, 33, 3, dtype, transposed=transposed)
    tensors, seen, addmm = testing.make(case), [], half_products.addmm
    monkeypatch.setattr(half_products, "addmm", lambda *a: seen.append(a[1].shape) or addmm(*a))
    host._load()  # makes all plans anew, with this addmm
    try:
        ours = testing.run(testing.ours, case, tensors)
    finally:
        monkeypatch.setattr(half_products, "addmm", addmm)
        host._load()
    assert served == [True]
    assert seen == [(40, 33), (40, 65)]
    by_python()
    assert_same_bits(ours, testing.run(testing.ours, case, tensors))
    monkeypatch.undo()
    host._load()


@pytest.mark.compile
@pytest.mark.parametrize("keep", [None, "output", "inner"])
def test_compiled_autograd_traces_the_op(keep, served):
    from torch._dynamo import compiled_autograd

    adapter = lorafast.LoRA(r=4, dropout=0.3) if keep is None else lorafast.DoRA(r=4, keep=keep)
    layer, x = lora(adapter=adapter), torch.randn(5, 16)
    plain = step(layer, x)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with compiled_autograd._enable(torch.compile(backend=backend)):
        assert_same_bits(step(layer, x), plain)
    assert any("linear_backward" in target for target in seen)
    assert served == [True, True]


def lora(K=16, N=24, adapter=None, **options):
    layer = lorafast.Linear(K, N, adapter=adapter or lorafast.LoRA(r=4, alpha=8, **options))
    torch.nn.init.normal_(layer.lora_B)
    return layer


def step(layer, x):
    """y and all gradients, by name."""
    torch.manual_seed(3)
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **grads}


LAYERS = {
    "lora": lambda: lora(),
    "dropout": lambda: lora(dropout=0.3),
    "lamda": lambda: lora(adapter=lorafast.LaMDA(r=4)),
    "vera": lambda: lora(adapter=lorafast.VeRA(r=4)),
    "dora": lambda: lora(adapter=lorafast.DoRA(r=4, dropout=0.2)),
    "dora-exact": lambda: lora(adapter=lorafast.DoRA(r=4, detach_norm=False)),
    "dora-cached": lambda: lora(adapter=lorafast.DoRA(r=4, cache_norm=True)),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (16,), (0, 16), (2, 0, 16)], ids=str)
def test_layers_draw_the_same_seeds(make, shape, served, by_python):
    layer, x = make(), torch.randn(shape)
    ours = step(layer, x)
    assert served
    by_python()
    assert_same_bits(ours, step(layer, x))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_autocast_casts_as_the_python_path_does(make, served, by_python):
    layer, x = make(), torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = step(layer, x)
        assert served
        by_python()
        assert ours["y"].dtype == torch.bfloat16
        assert_same_bits(ours, step(layer, x))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_tensors_are_packed_and_unpacked_in_the_same_order(make, served, by_python):
    def packed():
        seen = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.append((t.dtype, t.shape, t.clone())) or t,
            lambda t: seen.append((t.dtype, t.shape, t.clone())) or t,
        )
        torch.manual_seed(3)
        with hooks:
            layer(x).sum().backward()
        return seen

    layer, x = make(), torch.randn(5, 16, requires_grad=True)
    ours = packed()
    assert any(served)
    by_python()
    theirs = packed()
    assert [one[:2] for one in ours] == [one[:2] for one in theirs]
    assert all(torch.equal(one[2], same[2]) for one, same in zip(ours, theirs, strict=True))


def test_hooks_may_move_what_is_saved(served):
    layer, x = lora(), torch.randn(5, 16)
    plain = step(layer, x)
    with torch.autograd.graph.save_on_cpu():
        assert_same_bits(step(layer, x), plain)
    assert served == [True, True]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_mask(reentrant, served):
    layer, x = lora(dropout=0.3), torch.randn(5, 16)
    plain = step(layer, x)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)

    torch.manual_seed(3)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = checkpointed(x)
    y.square().sum().backward()
    assert torch.equal(y, plain["y"])
    assert torch.equal(x.grad, plain["x"])
    assert torch.equal(layer.lora_A.grad, plain["lora_A"])
    assert all(served)


@pytest.mark.parametrize("keep", ["output", "inner"])
@pytest.mark.parametrize("dropped", [False, True])
def test_an_output_modified_in_place(dropped, keep, served):
    layer = lora(adapter=lorafast.DoRA(r=4, keep=keep))
    y = layer(torch.randn(5, 16, requires_grad=True))
    loss = y.relu_().sum()
    if dropped:
        del y
    if keep == "inner":
        loss.backward()
    else:
        with pytest.raises(RuntimeError, match=r"weight \(24, 16\): its output was modified"):
            loss.backward()
    assert served == [True]


def test_a_second_backward_and_second_derivatives_are_refused(served):
    layer, x = lora(), torch.randn(5, 16, requires_grad=True)
    y = layer(x)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="double backward unsupported"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="batched gradients"):
        torch.autograd.grad(layer(x), x, torch.ones(2, 5, 24), is_grads_batched=True)
    assert all(served)


def test_gradients_of_any_layout_and_of_some_inputs(served):
    layer, x = lora(), torch.randn(5, 16, requires_grad=True)
    (whole,) = torch.autograd.grad(layer(x), x, torch.ones(5, 24))
    (expanded,) = torch.autograd.grad(layer(x).sum(), x)
    (strided,) = torch.autograd.grad(layer(x), x, torch.ones(24, 5).t())
    assert torch.equal(whole, expanded)
    assert torch.equal(whole, strided)
    (alone,) = torch.autograd.grad(layer(x).sum(), layer.lora_A)
    assert alone.shape == layer.lora_A.shape
    assert all(served)


def test_observers_see_ops(served, few_tokens_by_op):
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = lora(), torch.randn(5, 16, requires_grad=True)
    y = layer(x)
    assert served == [True]
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    assert any("linear_backward" in str(op) for op in counted.flop_counts["Global"])
    with FlopCounterMode(display=False) as counted:
        layer(x)
    assert any("lorafast" in str(op) for op in counted.flop_counts["Global"])
    assert served == [True, False]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, x: x.to_sparse(),
        lambda layer, x: x.double(),
        lambda layer, x: torch.view_as_complex(torch.randn(5, 16, 2)),
        lambda layer, x: x[:, :8],
        lambda layer, x: x.to("meta"),
        lambda layer, x: (layer.weight.requires_grad_(True), x)[1],
        lambda layer, x: "x",
        lambda layer, x: torch.tensor(1.0),
    ],
)
def test_what_is_unusual_or_wrong_is_left_to_python(change, served, by_python):
    """With the same words, or the same numbers."""

    def outcome():
        try:
            return layer(x)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    layer = lora()
    x = change(layer, torch.randn(5, 16))
    before = torch.get_rng_state()
    ours = outcome()
    assert served == [False]
    assert torch.equal(torch.get_rng_state(), before)
    by_python()
    theirs = outcome()
    if isinstance(theirs, str):
        assert ours == theirs
    else:
        torch.testing.assert_close(ours, theirs)


def test_a_forced_backend_and_the_switch(served, monkeypatch):
    layer, x = lora(), torch.randn(5, 16)
    layer(x)
    monkeypatch.setenv("LORAFAST_BACKEND", "eager")
    layer(x)
    monkeypatch.setenv("LORAFAST_BACKEND", "cpu")
    layer(x)
    assert served == [True, False, True]
    monkeypatch.setenv("LORAFAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense is not one of"):
        layer(x)


def test_the_switch_is_read_at_the_first_call(monkeypatch):
    ready()
    monkeypatch.setattr(host, "linear", host._first_call)
    monkeypatch.setenv("LORAFAST_HOST", "0")
    layer, x = lora(), torch.randn(5, 16)
    layer(x)
    assert not host.is_ready()
    monkeypatch.setenv("LORAFAST_HOST", "1")
    layer(x)
    assert host.is_ready()


def test_a_build_that_fails_is_told_once_and_python_serves(monkeypatch, recwarn):
    from lorafast.runtime import fallback

    ready()
    monkeypatch.setattr(fallback, "_to_issue", [True])
    monkeypatch.setattr(host, "linear", host._first_call)
    monkeypatch.setattr(
        host.extension, "host", lambda: fallback.Remediable("no headers of torch here")
    )
    layer, x = lora(), torch.randn(5, 16)
    layer(x)
    layer(x)
    told = [str(one.message) for one in recwarn if "slower way" in str(one.message)]
    assert len(told) == 1
    assert "no headers of torch here" in told[0]
    assert not host.is_ready()


def test_threads_share_the_plans(served):
    layer, x = lora(), torch.randn(64, 16)
    right, wrong = step(layer, x), []

    def work():
        for _ in range(30):
            mine = copy.deepcopy(layer)
            y = mine(x.clone().requires_grad_())
            y.square().sum().backward()
            if not torch.equal(mine.lora_A.grad, right["lora_A"]):
                wrong.append(mine.lora_A.grad)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(served)


def test_inference_mode_and_frozen_adapters(served, by_python):
    layer, x = lora(adapter=lorafast.DoRA(r=4)), torch.randn(5, 16)
    with torch.inference_mode():
        y = layer(x)
    assert y.is_inference()
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    assert served == [True] * 3
    by_python()
    assert torch.equal(layer(x), y)


def test_the_output_is_no_view_and_takes_writes(served):
    layer = lora()
    for shape in ((5, 16), (2, 3, 16)):
        y = layer(torch.randn(shape, requires_grad=True))
        assert y._base is None
        y.mul_(2).sum().backward()
    assert served == [True, True]


@pytest.mark.slow
def test_several_thousand_lengths_do_not_fill_memory(served):
    layer = lora(K=2, N=2)
    with torch.no_grad():
        for M in range(1, 4200):
            layer(torch.zeros(M, 2))
    assert all(served)
    assert dispatch._routes.cache_info().currsize <= 4096


def test_exact_norms_reach_the_host_path(served):
    layer = lora(adapter=lorafast.DoRA(r=4, detach_norm=False))
    layer(torch.randn(5, 16, requires_grad=True)).sum().backward()
    assert served[-1]
