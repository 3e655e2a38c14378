"""DoRA's norm is never stale, and is kept between calls only where the user asks for it."""

import ctypes
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import lorafast
from lorafast import functional
from lorafast.engine import formula, weight_norm


@pytest.fixture
def computed(monkeypatch, calls_by_python):
    """How often a norm was really computed."""
    calls, real = [], formula.row_norm
    monkeypatch.setattr(formula, "row_norm", lambda *args: calls.append(1) or real(*args))
    return calls


def layer_of(dtype=None, **settings):
    layer = lorafast.Linear(12, 10, adapter=lorafast.DoRA(r=3, **settings), dtype=dtype)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


def caching_layer():
    return layer_of(cache_norm=True).eval()


def fresh(layer):
    return functional.row_norm(layer.weight, layer.lora_A, layer.lora_B, scaling=layer.scaling)


def now(layer, x):
    """The output of the layer's tensors as they are, with the norm of that moment."""
    return lorafast.linear(
        x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, magnitude=layer.magnitude,
        norm=fresh(layer), scaling=layer.scaling,
    )  # fmt: skip


X = torch.ones(4, 12)


def test_every_forward_computes_it(computed):
    layer = layer_of()
    computed.clear()
    for training, grad in itertools.product([True, False], repeat=2):
        layer.train(training)
        with torch.set_grad_enabled(grad):
            layer(X), layer(X)
    assert len(computed) == 8


@torch.no_grad()
def test_a_norm_is_kept_for_evaluation_where_it_is_asked_for(computed):
    layer = caching_layer()
    computed.clear()
    first = layer(X)
    assert torch.equal(layer(X), first)
    assert len(computed) == 1


def write_through_dlpack(tensor):
    torch.from_dlpack(torch.utils.dlpack.to_dlpack(tensor.detach())).mul_(2)


def write_through_numpy(tensor):
    view = tensor.detach().numpy()
    view *= 2


def write_through_the_storage(tensor):
    tensor.untyped_storage().copy_((tensor * 2).untyped_storage())


def write_to_the_address(tensor):
    twice = tensor * 2
    ctypes.memmove(tensor.data_ptr(), twice.data_ptr(), twice.nbytes)


WRITES = {
    "data": lambda tensor: tensor.data.copy_(tensor * 2),
    "detach": lambda tensor: tensor.detach().copy_(tensor * 2),
    "dlpack": write_through_dlpack,
    "numpy": write_through_numpy,
    "storage": write_through_the_storage,
    "address": write_to_the_address,
}


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@torch.no_grad()
def test_the_norm_is_that_of_the_tensors_however_they_are_written(write, name, axis):
    layer = layer_of(axis=axis, dtype=torch.float64).eval()
    x = torch.randn(4, 12, dtype=torch.float64)
    before, old = layer(x), getattr(layer, name).clone()
    write(getattr(layer, name))
    assert torch.equal(getattr(layer, name), old * 2)
    W = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    if axis == "out":
        want = (x @ W.t()) * (layer.magnitude / W.norm(dim=1)) + layer.bias
    else:
        want = (x * (layer.magnitude / W.norm(dim=0))) @ W.t() + layer.bias
    torch.testing.assert_close(layer(x), want)
    assert not torch.allclose(want, before)


def receive(rank, path):
    """Rank 0 sends lora_B to rank 1, whose layer has run in eval before."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    layer, x = layer_of().eval(), torch.randn(4, 12)
    with torch.no_grad():
        layer(x)
        dist.broadcast(layer.lora_B, 0)
        dist.all_reduce(layer.weight.data)
        assert torch.equal(layer(x), now(layer, x))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.distributed
def test_the_norm_is_that_of_the_tensors_a_collective_has_written(tmp_path):
    mp.spawn(receive, args=(tmp_path / "ranks",), nprocs=2)


CHANGES = {
    "lora_A in place": lambda layer: layer.lora_A.mul_(2),
    "lora_B in place": lambda layer: layer.lora_B.mul_(2),
    "weight in place": lambda layer: layer.weight.mul_(2),
    "lora_B.data swapped": lambda layer: setattr(layer.lora_B, "data", layer.lora_B.data * 2),
    "train() after a .data write": lambda layer: (
        layer.lora_B.data.mul_(2),
        layer.train(),
        layer.eval(),
    ),
    ".to(dtype)": lambda layer: layer.to(torch.float64),
    "a state dict": lambda layer: layer.load_state_dict(
        {k: v * 2 for k, v in layer.state_dict().items()}
    ),
    "scaling": lambda layer: setattr(layer, "scaling", 9.0),
    "an assigned state dict": lambda layer: layer.load_state_dict(
        {k: v * 2 for k, v in layer.state_dict().items()}, assign=True
    ),
    "merge and unmerge": lambda layer: (layer.lora_B.mul_(2), layer.merge(), layer.unmerge()),
    "reset_adapter": lambda layer: layer.reset_adapter(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_norm_that_is_kept_notices_what_torch_counts(change):
    layer = caching_layer()
    layer(X)
    CHANGES[change](layer)
    x = X.to(layer.weight.dtype)
    assert torch.equal(layer(x), now(layer, x))


@pytest.mark.parametrize("fused", [False, True])
def test_cache_norm_serves_accumulation_and_no_more(computed, fused):
    layer = layer_of(cache_norm=True)
    optimizer = torch.optim.AdamW(
        [p for p in layer.parameters() if p.requires_grad], lr=0.1, fused=fused
    )
    computed.clear()
    for step in range(3):
        for _ in range(4):
            layer(X).square().sum().backward()
        assert len(computed) == step + 1
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert torch.equal(layer(X), now(layer, X))


@torch.no_grad()
def test_two_layers_with_one_weight_have_two_entries(computed):
    a, before = caching_layer(), len(weight_norm._entries)
    b = lorafast.Linear.from_linear(
        torch.nn.Linear(12, 10), lorafast.DoRA(r=3, cache_norm=True)
    ).eval()
    b.weight = a.weight
    b.lora_B.normal_()
    computed.clear()
    first = a(X), b(X)
    assert len(computed) == 2
    assert torch.equal(a(X), first[0])
    assert torch.equal(b(X), first[1])
    assert len(computed) == 2
    assert len(weight_norm._entries) == before + 2


@torch.no_grad()
def test_a_factor_replaced_by_another_is_seen_wherever_it_lies(computed):
    layer = caching_layer()
    layer(X)
    computed.clear()
    for _ in range(20):
        # The allocator may well hand out the address of the one before.
        layer.lora_A = torch.nn.Parameter(torch.randn(3, 12))
        layer(X)
    assert len(computed) == 20


def test_the_function_never_caches(computed):
    layer = layer_of()
    given = {
        "weight": layer.weight,
        "bias": None,
        "lora_A": layer.lora_A,
        "lora_B": layer.lora_B,
        "magnitude": layer.magnitude,
    }
    with torch.no_grad():
        computed.clear()
        lorafast.linear(X, **given, training=False)
        lorafast.linear(X, **given, training=False)
    assert len(computed) == 2


@torch.no_grad()
def test_a_capture_is_not_cached(computed, monkeypatch):
    layer = caching_layer()
    monkeypatch.setattr(weight_norm.devices, "capturing", lambda tensor: True)
    computed.clear()
    layer(X), layer(X)
    assert len(computed) == 2


@torch.no_grad()
def test_every_part_of_the_formula_is_part_of_the_key(computed):
    W, A, B = torch.randn(8, 8), torch.randn(3, 8), torch.randn(8, 3)
    calls = [
        {},
        {"axis": "in"},
        {"scaling": 2.0},
        {"scaling": torch.tensor(2.0)},
        {"core": torch.randn(3, 3)},
        {"core": torch.randn(3)},
        {"out_scale": torch.randn(8)},
    ]
    computed.clear()
    for weight in (W, W.t()):
        for given in calls:
            first = functional.row_norm(weight, A, B, **given, cache=True)
            assert torch.equal(first, functional.row_norm(weight, A, B, **given, cache=True))
            assert torch.equal(first, functional.row_norm(weight, A, B, **given))
    assert len(computed) == 2 * 2 * len(calls)


@torch.no_grad()
def test_writes_to_every_part_are_seen(computed):
    W, A, B = torch.randn(8, 8), torch.randn(3, 8), torch.randn(8, 3)
    parts = {"core": torch.randn(3, 3), "out_scale": torch.rand(8), "scaling": torch.tensor(2.0)}
    both, layer = torch.randn(2, 8, 8), caching_layer()
    computed.clear()
    for part in (W, A, B, *parts.values()):
        functional.row_norm(W, A, B, **parts, cache=True)
        part.mul_(2)
    layer.weight = torch.nn.Parameter(both[0])
    layer.lora_A.data, layer.lora_B.data, layer.lora_magnitude.data = A, B, torch.ones(8)
    for half in both:
        layer.weight.data = half
        functional.row_norm(layer.weight, layer.lora_A, layer.lora_B, cache=True)
    assert len(computed) == 6 + 2


@torch.no_grad()
def test_the_exact_norm_is_kept_where_no_gradient_is_recorded(computed):
    layer = layer_of(detach_norm=False, cache_norm=True).eval()
    computed.clear()
    layer(X), layer(X)
    assert len(computed) == 1


@torch.no_grad()
def test_a_storage_swapped_by_data_is_seen_wherever_it_lies(computed):
    layer = caching_layer()
    computed.clear()
    for factor in range(10):
        layer.weight.data = torch.empty(0)
        layer.weight.data = torch.ones(10, 12) * factor
        layer(X)
    assert len(computed) == 10


@torch.no_grad()
def test_what_is_handed_out_is_not_the_cache():
    layer = caching_layer()
    given = layer.weight, layer.lora_A, layer.lora_B
    first = functional.row_norm(*given, cache=True)
    want = first.clone()
    first.zero_()
    assert torch.equal(functional.row_norm(*given, cache=True), want)


def test_a_norm_of_inference_mode_is_not_used_outside_it():
    layer = layer_of(cache_norm=True)
    with torch.inference_mode():
        layer(X)
    layer(X).sum().backward()


@pytest.mark.compile
@torch.no_grad()
def test_compiled_code_does_not_cache(computed):
    layer = caching_layer()
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(X)
    computed.clear()
    compiled(X), compiled(X)
    assert len(computed) == 2


def test_inference_tensors_are_not_cached(computed):
    with torch.inference_mode():
        layer = caching_layer()
        computed.clear()
        layer(X), layer(X)
    assert len(computed) == 2


def test_entries_die_with_their_layer():
    before = len(weight_norm._entries)
    layer = caching_layer()
    with torch.no_grad():
        layer(X)
    assert len(weight_norm._entries) == before + 1
    del layer
    assert len(weight_norm._entries) == before


@pytest.mark.parametrize("form", ["core", "diagonal", "out_scale"])
def test_the_effective_B_is_the_one_of_the_same_delta(form):
    x, W, A, B = (
        torch.randn(*s, dtype=torch.float64) for s in ((5, 12), (10, 12), (3, 12), (10, 3))
    )
    extra = {
        "core": {"core": torch.randn(3, 3, dtype=torch.float64)},
        "diagonal": {"core": torch.randn(3, dtype=torch.float64)},
        "out_scale": {"out_scale": torch.randn(10, dtype=torch.float64)},
    }[form]
    delta = lorafast.linear(x, torch.zeros_like(W), None, A, B, scaling=0.7, **extra)
    folded = (
        formula.effective_B(lorafast.engine.problem.LayerTensors(W, lora_A=A, lora_B=B, **extra))
        @ A
        * 0.7
    )
    torch.testing.assert_close(x @ folded.t(), delta)


def test_a_layer_with_a_trained_weight_keeps_its_policy(computed):
    layer = layer_of(cache_norm=True)
    layer.weight.requires_grad_(True)
    computed.clear()
    layer(X), layer(X)
    assert len(computed) == 1
