"""Exporters, sparse and nested tensors and subclasses get the formula in torch's own ops."""

import pytest
import torch
from helpers.rotations import rotating, thinned

import lorafast
from lorafast import DoRA, LaMDA, LoRA

ADAPTERS = [LoRA(r=2), DoRA(r=2), DoRA(r=2, axis="in"), LaMDA(r=2)]
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)


class Wrapped(torch.Tensor):
    """A tensor that computes its ops itself, and serves torch's alone."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function.namespace in ("aten", "prim"), function
        args, kwargs = torch.utils._pytree.tree_map_only(
            cls, lambda wrapped: wrapped.inner, (args, kwargs or {})
        )
        return torch.utils._pytree.tree_map_only(torch.Tensor, cls, function(*args, **kwargs))


def trained(adapter):
    layer = lorafast.Linear(6, 5, adapter=adapter)
    with torch.no_grad():
        for name, part in layer.named_parameters():
            if name.startswith("lora"):
                part.add_(torch.randn_like(part) * 0.2)
    return layer.eval()


@pytest.mark.parametrize(
    ("adapter", "strict"),
    thinned(
        (adapter, strict)
        for adapter, both in rotating(ADAPTERS, ((False, True), (True, False)))
        for strict in both
    ),
    ids=repr,
)
@pytest.mark.compile
def test_an_exported_program_has_torchs_ops_alone(adapter, strict):
    layer, x = trained(adapter), torch.randn(3, 6)
    program = torch.export.export(layer, (x,), strict=strict)
    ops = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert ops
    assert all(isinstance(op, torch._ops.OpOverload) and op.namespace == "aten" for op in ops), ops
    torch.testing.assert_close(program.module()(x), layer(x))
    torch.testing.assert_close(program.run_decompositions().module()(x), layer(x))


@each_adapter
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_program_has_torchs_ops_alone(adapter):
    layer, x = trained(adapter), torch.randn(3, 6)
    traced = torch.jit.trace(layer, x)
    assert not [node for node in traced.graph.nodes() if node.kind().startswith("lorafast")]
    x = torch.randn(7, 6)
    torch.testing.assert_close(traced(x), layer(x))


def test_a_merged_model_exports():
    model = lorafast.adapt(torch.nn.Sequential(torch.nn.Linear(6, 5)), DoRA(r=2))
    model, x = lorafast.merge(model), torch.randn(3, 6)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("adapter", [LoRA(r=2), DoRA(r=2), LaMDA(r=2)], ids=repr)
@pytest.mark.parametrize("form", ["to_sparse", "to_sparse_csr"])
def test_a_sparse_x_gives_what_the_dense_one_gives(adapter, form):
    layer, x = trained(adapter), torch.randn(3, 6).relu()
    torch.testing.assert_close(layer(getattr(x, form)()), layer(x))


@pytest.mark.parametrize("adapter", [LoRA(r=2), DoRA(r=2), LaMDA(r=2)], ids=repr)
def test_a_jagged_x_gives_what_its_parts_give(adapter):
    layer, parts = trained(adapter), [torch.randn(3, 6), torch.randn(2, 6)]
    y = layer(torch.nested.nested_tensor(parts, layout=torch.jagged))
    for found, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(found, layer(part))
    y.values().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("form", ["jagged", "sparse_coo", "sparse_csr"])
@pytest.mark.parametrize("adapter", [LoRA(r=2, dropout=0.3), DoRA(r=2, dropout=0.3)], ids=repr)
def test_dropout_of_an_x_without_a_mask_is_refused_in_words(adapter, form):
    x = torch.randn(3, 6)
    if form == "jagged":
        x = torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)
    else:
        x = x.to_sparse(layout=getattr(torch, form))
    layer = trained(adapter)
    layer(x)
    with pytest.raises(NotImplementedError, match=r"^x \(.*\) is a .* tensor, .* no dropout"):
        layer.train()(x)


def test_a_plain_weight_is_not_blamed_for_what_x_lacks():
    class Poor(Wrapped):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError("of x")

    with pytest.raises(NotImplementedError, match=r"^of x$"):
        trained(LoRA(r=2))(Poor(torch.randn(3, 6)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_x_without_a_shape_is_refused_in_words():
    with pytest.raises(TypeError, match="x is a nested tensor of strided layout"):
        trained(LoRA(r=2))(torch.nested.nested_tensor([torch.randn(3, 6)], layout=torch.strided))


@each_adapter
def test_a_subclass_that_knows_torchs_ops_alone_is_served(adapter):
    layer, x = trained(adapter), torch.randn(3, 6)
    y = layer(Wrapped(x))
    assert type(y) is Wrapped
    torch.testing.assert_close(y.inner, layer(x))
