"""Past the dispatcher or through it: observers see the ops, and the results are the same."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lorafast
from lorafast import functional, testing
from lorafast.engine import ops
from lorafast.engine.multi_adapter import Factors
from lorafast.runtime import torch_internals
from lorafast.testing import FORMS, Case

pytestmark = pytest.mark.usefixtures("few_tokens_by_op")

BY_NAME = {form.name: form for form in FORMS}


class Seen(TorchDispatchMode):
    """Which of lorafast's ops go by."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lorafast":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class Asked(TorchFunctionMode):
    """Looks on from above and changes nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Overheard:
    """An op of torch.ops that tells when it is called."""

    def __init__(self, op, names):
        self._op, self._names = op, names

    def __call__(self, *args):
        self._names.add(self._op.__name__)
        return self._op(*args)

    def __getattr__(self, name):
        return getattr(self._op, name)


@pytest.fixture
def called(monkeypatch):
    """The ops called through torch.ops."""
    names = set()
    for name in ("linear", "linear_backward", "row_norm", "several", "several_backward"):
        monkeypatch.setattr(
            torch.ops.lorafast, name, Overheard(getattr(torch.ops.lorafast, name), names)
        )
    return names


def layer_of(adapter=None):
    layer = lorafast.Linear(12, 10, adapter=adapter or lorafast.LoRA(r=4))
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


X = torch.randn(5, 12)


@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("form", [form.name for form in FORMS])
def test_the_numbers_are_the_same_both_ways(form, p, low, called):
    case = Case(BY_NAME[form], 7, 6, 9, 3, torch.float32, p)
    if not case.works:
        pytest.skip("keep='output' and a mask on the base term exclude each other")
    t, autocast = (
        testing.make(case),
        torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None),
    )
    t["dy"] = t["dy"].to(low or t["dy"].dtype)
    with autocast:
        past = testing.run(testing.ours, case, t)
        # The exact norm has a gradient of its own, which goes by the op in any case.
        assert called <= ({"row_norm", "row_norm_backward"} if form == "dora-exact" else set())
        with Seen() as seen:
            through = testing.run(testing.ours, case, t)
    assert {"linear", "linear_backward"} <= set(seen.names)
    assert ("row_norm" in seen.names) == case.form.magnitude
    assert all(torch.equal(past[name], through[name]) for name in through)
    with torch.no_grad(), autocast:
        y = testing.ours(case, t)
        with Seen() as seen:
            assert torch.equal(testing.ours(case, t), y)
    assert "linear" in seen.names


@pytest.mark.parametrize("grad", [True, False])
def test_several_adapters_the_same_both_ways(grad, called):
    def run():
        with torch.set_grad_enabled(grad):
            x, leaves = X.clone().requires_grad_(), [one.clone().requires_grad_() for one in given]
            pairs = [
                Factors(*leaves[:3], dropout=0.4, seed=torch.tensor([3])),
                Factors(*leaves[3:], scaling=0.5),
            ]
            y = functional.several(x, weight, None, pairs)
        return [y, *(torch.autograd.grad(y.sum(), [x, *leaves]) if grad else [])]

    weight = torch.randn(10, 12)
    given = [torch.randn(s) for s in ((2, 12), (10, 2), (10,), (3, 12), (10, 3), (10,))]
    past = run()
    assert not called
    with Seen() as seen:
        through = run()
    assert seen.names == ["several", "several_backward"][: 1 + grad]
    assert all(map(torch.equal, past, through))


@pytest.mark.parametrize(
    "adapter", [lorafast.LoRA(r=4, dropout=0.3), lorafast.DoRA(r=4), lorafast.LaMDA(r=4)], ids=repr
)
def test_what_is_saved_is_the_same_and_in_the_same_order(adapter):
    # A checkpoint may be recomputed under a mode that its first forward did not see, and counts.
    def saved():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            layer(x)
        return [(tuple(t.shape), t.dtype, t.data_ptr() in known) for t in kept]

    layer, x = layer_of(adapter), X.clone().requires_grad_()
    known = {t.data_ptr() for t in (x, *layer.parameters())}
    past = saved()
    with Seen():
        assert saved() == past


def test_a_backward_watched_alone_is_seen():
    layer = layer_of()
    y = layer(X)
    with Seen() as seen:
        y.sum().backward()
    assert seen.names == ["linear_backward"]


def test_a_forward_watched_alone_runs_backward_past_it(called):
    layer = layer_of()
    with Seen():
        y = layer(X)
    called.clear()
    y.sum().backward()
    assert not called


def _profiled():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer_of()(X)
    assert "lorafast::linear" in {event.key for event in profile.key_averages()}


def _fake():
    with FakeTensorMode() as mode:
        layer = layer_of()
        fake = mode.from_tensor(X)
    assert layer(fake).shape == (5, 10)  # outside the mode, the tensors alone tell


def _asked():
    with Asked():
        layer_of()(X)


def _device():
    with torch.device("cpu"):
        layer_of()(X)


def _meta():
    assert layer_of().to("meta")(X.to("meta")).is_meta


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("look", [_profiled, _fake, _asked, _device, _meta])
def test_whoever_looks_on_sees_the_op(look, called):
    look()
    assert called == {"linear"}
    called.clear()
    assert torch_internals.bypasses_dispatcher(X, ())
    layer_of()(X)
    assert not called


def test_make_fx_sees_the_op():
    graph = make_fx(layer_of())(X).graph
    assert any(node.target is torch.ops.lorafast.linear.default for node in graph.nodes)


def test_selective_checkpointing_sees_the_op():
    met = []

    def policy(ctx, op, *args, **kwargs):
        met.append(op)
        return (
            CheckpointPolicy.MUST_SAVE
            if op is torch.ops.lorafast.linear.default
            else CheckpointPolicy.PREFER_RECOMPUTE
        )

    layer, x = layer_of(), X.clone().requires_grad_()
    y = checkpoint(
        layer,
        x,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    assert torch.ops.lorafast.linear.default in met
    got = torch.autograd.grad(y.sum(), [x, layer.lora_A, layer.lora_B])
    assert all(
        map(torch.equal, got, torch.autograd.grad(layer(x).sum(), [x, layer.lora_A, layer.lora_B]))
    )


def _leaked():
    # What outlives a transform stays wrapped.
    left = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(X.clone())
    return left[0]


STRANGE = {
    "negated": lambda: torch._neg_view(-X),
    "left by a transform": _leaked,
    "a zero nobody has written": lambda: torch._efficientzerotensor((5, 12)),
    "a subclass": lambda: X.as_subclass(type("Other", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("grad", [True, False])
def test_a_tensor_the_dispatcher_has_to_mend_goes_by_it(name, grad, called):
    x, layer = STRANGE[name](), layer_of()
    assert not torch_internals.bypasses_dispatcher(x, ())
    assert not torch_internals.bypasses_dispatcher(X, (x,))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(
            layer(x).as_subclass(torch.Tensor), layer(X * 0 if "zero" in name else X)
        )
    assert called == {"linear"}


def test_the_tensors_that_bypass_the_dispatcher():
    bypasses = torch_internals.bypasses_dispatcher
    assert bypasses(X, (None, torch.nn.Parameter(X), X[1:, ::2], X.to(torch.bfloat16)))
    assert not bypasses(X, (X.to("meta"),))
    assert not bypasses(X.to("meta"), ())
    assert not bypasses(None, ())
    assert not bypasses(X, ([1.0],))


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("2.13.0", True),
        ("2.13.1+cpu", True),
        ("2.13.0+cu130", True),
        ("2.14.0", False),
        ("2.13.0.dev20260101", False),
        ("2.13.0rc1", False),
        ("2.13.0a0+git1234567", False),
        ("2.11.0", False),
        ("git", False),
    ],
)
def test_the_versions_on_which_private_symbols_are_used(version, tested):
    assert torch_internals.is_tested(version) is tested


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("form", [form.name for form in FORMS])
def test_an_untested_torch_gives_the_same_numbers(form, p, monkeypatch, called, calls_by_python):
    case = Case(BY_NAME[form], 7, 6, 9, 3, torch.float32, p)
    if not case.works:
        pytest.skip("keep='output' and a mask on the base term exclude each other")
    t = testing.make(case)
    fast = testing.run(testing.ours, case, t)
    monkeypatch.setattr(torch_internals, "enabled", False)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        slow = testing.run(testing.ours, case, t)
    assert {"linear", "linear_backward"} <= called
    assert all(torch.equal(fast[name], slow[name]) for name in fast)


def test_an_untested_torch_casts_as_autocast_says(monkeypatch, calls_by_python):
    monkeypatch.setattr(torch_internals, "enabled", False)
    layer, x = layer_of(lorafast.DoRA(r=4)), X.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_torch_of_another_version_without_the_symbols_trains_all_the_same():
    probe = """
import torch
torch.__version__ = "2.99.0"
for name in ("_any_requires_grad", "_len_torch_dispatch_stack", "_len_torch_function_stack",
             "_is_any_autocast_enabled", "_ExcludeDispatchKeyGuard", "_get_mkldnn_enabled"):
    delattr(torch._C, name)
import lorafast
from lorafast.runtime import torch_internals
assert not torch_internals.enabled
torch.manual_seed(0)
for adapter in (lorafast.LoRA(r=2, dropout=0.1), lorafast.DoRA(r=2), lorafast.LaMDA(r=2)):
    layer, x = lorafast.Linear(6, 5, adapter=adapter), torch.randn(3, 6, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all() and layer.lora_B.grad is not None
print("trained")
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.strip() == "trained", done.stderr


def test_the_guard_is_the_dispatchers_own():
    with torch._C._AutoDispatchBelowAutograd(), ops.below_autocast():
        own = torch._C._dispatch_tls_local_exclude_set()
    with ops.below_autograd():
        assert torch._C._dispatch_tls_local_exclude_set() == own


def test_inference_mode_and_its_tensors():
    layer = layer_of(lorafast.DoRA(r=4))
    with torch.inference_mode():
        y = layer(X)
        x = X.clone()
    assert y.is_inference()
    assert torch.equal(layer(X), y)
    layer.requires_grad_(False)
    assert not layer(x).is_inference()
    layer.lora_B.requires_grad_(True)
    layer.lora_A.requires_grad_(True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        layer(x)


@pytest.mark.parametrize("adapter", [lorafast.LoRA(r=4), lorafast.DoRA(r=4)], ids=repr)
def test_a_parametrized_factor_is_read_through_its_parametrization(adapter):
    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    layer = layer_of(adapter)
    with torch.no_grad():
        plain = layer_of(adapter)
        plain.load_state_dict(layer.state_dict())
        plain.lora_A.mul_(2)
    torch.nn.utils.parametrize.register_parametrization(layer, "lora_A", Twice())
    assert torch.equal(layer(X), plain(X))
    del layer._parameters["bias"]
    layer.bias = None  # a plain attribute, as some wrappers leave in a Parameter's place
    plain.bias = None
    assert torch.equal(layer(X), plain(X))
