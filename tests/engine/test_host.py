"""The host path in C++ against the Python path: the same bits, saved tensors and words."""

import copy
import itertools
import threading

import pytest
import torch
from helpers.cpp_compiler import needs_compiler
from helpers.host_path import LAYERS, assert_same_bits, lora, ready, step
from helpers.rotations import rotating

import lorafast
from lorafast import testing
from lorafast.engine import dispatch, half_products, host
from lorafast.testing import FORMS, Case

pytestmark = needs_compiler
SHAPES = ((7, 24, 40, 3), (1, 33, 17, 1), (64, 130, 96, 16), (0, 8, 16, 2), (300, 65, 257, 40))
TURNS = tuple(itertools.product((0.0, 0.2), (True, False), (False, True)))


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


def test_a_provisional_plan_is_asked_again(monkeypatch):
    ready()
    layer, x, asked = lora(), torch.randn(5, 16), []

    def provisional(*given):
        asked.append(len(given))
        return host.PROVISIONAL

    monkeypatch.setattr(host, "_plan", provisional)
    monkeypatch.setattr(host, "linear", host._load())
    try:
        layer(x)
        layer(x)
        assert len(asked) == 2
    finally:
        monkeypatch.undo()
        host._load()


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


def together(call, inputs):
    """Call a function on each input 20 times, a thread for each; the outputs by input."""
    outputs, barrier = {}, threading.Barrier(len(inputs))
    torch_threads = torch.get_num_threads()

    def work(index):
        # A new thread has torch's default again, and with it other sums.
        torch.set_num_threads(torch_threads)
        with torch.no_grad():
            barrier.wait()
            outputs[index] = [call(inputs[index]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outputs[index] for index in range(len(inputs))]


@pytest.mark.parametrize("host_path", [True, False])
@pytest.mark.parametrize("name", [*LAYERS, "lamda-freezing"])
def test_threads_share_one_layer_without_gradients(name, host_path, served, by_python):
    layer = LAYERS[name.removesuffix("-freezing")]()
    if name == "lamda-freezing":
        schedule = lorafast.schedule.LaMDAFreeze(layer, total_steps=4, fraction=1.0)
        schedule.step()
        assert 0 < layer.frozen_columns < layer.r
    layer.eval()
    if not host_path:
        by_python()
    # Few tokens and many, which other kernels serve.
    inputs = [torch.randn(M, 16) for M in (1, 7, 64, 300)]
    with torch.no_grad():
        wanted = [layer(x) for x in inputs]
    layer.eval()  # what cache_norm=True kept is dropped, so that the threads make it anew
    for found, want in zip(together(layer, inputs), wanted, strict=True):
        assert all(torch.equal(y, want) for y in found)
    assert served.count(True) == (84 if host_path else 0)


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
@pytest.mark.parametrize("keep", ["inner", "output", "recompute"])
def test_frozen_columns_and_biases(keep, served, by_python):
    """Parts of a layer that do not train, each with what it leaves out of a backward."""
    x, weight, bias, A, B, lora_bias = (
        torch.randn(*shape) for shape in ((9, 16), (24, 16), (24,), (4, 16), (24, 4), (24,))
    )
    norm = lorafast.functional.row_norm(weight, A, B)
    magnitude = norm * 1.5
    trained = {"A": A, "B": B, "magnitude": magnitude}

    def grads():
        for tensor in trained.values():
            tensor.requires_grad_().grad = None
        y = lorafast.linear(
            x, weight, bias, A, B, None, magnitude, norm,
            lora_bias=lora_bias, scaling=0.5, keep=keep, frozen_columns=3,
        )  # fmt: skip
        y.square().sum().backward()
        return {"y": y.detach(), **{name: tensor.grad for name, tensor in trained.items()}}

    ours = grads()
    assert served == [True]
    assert not ours["B"][:, :3].any()
    assert ours["B"][:, 3:].all()
    by_python()
    assert_same_bits(ours, grads())


def test_a_gain_without_a_norm_is_zero(served, by_python):
    layer = lora(adapter=lorafast.DoRA(r=4))
    with torch.no_grad():
        layer.weight[2] = layer.lora_B[2] = 0
    x = torch.randn(9, 16)
    ours = step(layer, x)
    assert served == [True]
    assert torch.equal(ours["y"][:, 2], layer.bias[2].expand(9))
    assert all(value.isfinite().all() for value in ours.values())
    by_python()
    assert_same_bits(ours, step(layer, x))


def test_plans_are_those_of_their_own_problem(served):
    """Problems that differ in one size alone."""
    x = torch.randn(6, 300)
    for r in (4, 300):
        layer = lorafast.Linear(300, 300, adapter=lorafast.LoRA(r=r))
        torch.nn.init.normal_(layer.lora_B)
        delta = layer.lora_B.double() @ layer.lora_A.double() * layer.adapter.scaling
        wanted = x.double() @ (layer.weight.double() + delta).T + layer.bias.double()
        torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-3)
    # A rank of 300 is beyond the kernels.
    assert served == [True, False]


def test_several_thousand_lengths_do_not_fill_memory(served):
    layer = lora(K=2, N=2)
    with torch.no_grad():
        for M in range(1, 4200):
            layer(torch.zeros(M, 2))
    assert all(served)
    assert dispatch._routes.cache_info().currsize <= 4096
