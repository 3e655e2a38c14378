"""Products in half precision by fp32 panels: exact, rounded once, in bounded memory, where due."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.backends import each_name, problem
from helpers.cpp_compiler import needs_compiler
from helpers.integer_problems import LAYOUTS, whole_numbers

import lorafast
from lorafast import testing
from lorafast.engine import half_products, plain_products
from lorafast.engine.backends import cpu
from lorafast.engine.problem import BaseTerm, CallOptions, LayerTensors, UpProj
from lorafast.runtime import env, torch_internals
from lorafast.runtime.devices import Arch
from lorafast.testing import FORMS, Case

BY_NAME = {form.name: form for form in FORMS}
STARTS = ("none", "bias", "out")
HALVES = [torch.bfloat16, torch.float16]
# M, K, N: one of everything, odd ones, and more than one panel and block each way.
SHAPES = [(1, 1, 1), (1, 37, 23), (3, 16, 40), (29, 31, 33), (70, 9, 130), (40, 131, 8)]


@pytest.fixture
def slow(monkeypatch):
    """torch has no quick product in half precision, whatever the processor."""
    monkeypatch.setattr(half_products, "torch_is_slow", lambda dtype: dtype in HALVES)


@pytest.fixture
def small_panels(monkeypatch):
    """Panels of 8 rows of W and blocks of 8 tokens, so that small matrices have several."""
    monkeypatch.setattr(half_products, "_PANEL", 64)
    monkeypatch.setattr(half_products, "_BLOCK", 128)
    monkeypatch.setattr(half_products, "_FEWEST_ROWS", 4)
    monkeypatch.setattr(half_products, "_MOST_PANEL_ROWS", 8)


@pytest.fixture
def by_panels(slow, small_panels, monkeypatch, calls_by_python):
    """Every product in half precision goes by panels; return the shapes of those that went."""
    monkeypatch.setattr(half_products, "_FEW_TOKENS", 0)
    monkeypatch.setattr(half_products, "_FEWEST_ALONG_ROWS", 1)
    monkeypatch.setattr(half_products, "_FEWEST_ACROSS_ROWS", 1)
    products, addmm = [], half_products.addmm

    def recorded(start, a, b, out):
        products.append((a.shape[0], *b.shape))
        return addmm(start, a, b, out)

    monkeypatch.setattr(half_products, "addmm", recorded)
    return products


def start_of(kind, out):
    return {"none": None, "bias": whole_numbers(1, out.shape[1], out.dtype)[0], "out": out}[kind]


@pytest.mark.parametrize("panels", ["small", "whole"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_whole_numbers_to_the_bit(dtype, shape, panels, request):
    if panels == "small":
        request.getfixturevalue("small_panels")
    M, K, N = shape
    # Sums beyond 256, which bf16 cannot hold: one rounding too many, or of a part, shows.
    for layout, kind in itertools.product(LAYOUTS, STARTS):
        a, b = whole_numbers(M, K, dtype, layout), whole_numbers(K, N, dtype, layout)
        out = whole_numbers(M, N, dtype, "sliced")
        start = start_of(kind, out)
        exact = a.double() @ b.double() + (0 if start is None else start.double())
        around = out._base.clone()
        assert half_products.addmm(start, a, b, out) is out
        torch.testing.assert_close(out, exact.to(dtype), rtol=0, atol=0)
        around[1 : 1 + M, 3 : 3 + N] = out
        torch.testing.assert_close(out._base, around, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(0, 40, 50), (60, 0, 50), (60, 40, 0), (0, 0, 50)], ids=str)
def test_empty_operands(shape, transposed, small_panels):
    M, K, N = shape
    a, b = torch.ones(M, K, dtype=torch.bfloat16), torch.ones(K, N, dtype=torch.bfloat16)
    b = b.t().contiguous().t() if transposed else b
    for kind in STARTS:
        out = torch.ones(M, N, dtype=torch.bfloat16)
        start = start_of(kind, out)
        exact = torch.zeros(M, N) if start is None else start.expand(M, N).float()
        half_products.addmm(start, a, b, out)
        torch.testing.assert_close(out.float(), exact)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_product_errs_by_its_rounding_alone(dtype, transposed, small_panels):
    a, W = torch.randn(37, 301).to(dtype), torch.randn(83, 301).to(dtype)
    b = W.t().contiguous() if transposed else W.t()
    out = half_products.addmm(None, a, b, torch.empty(37, 83, dtype=dtype))
    truth = a.double() @ b.double()
    ideal = (truth.to(dtype).double() - truth).square().mean().sqrt()
    assert (out.double() - truth).square().mean().sqrt() <= 1.01 * ideal


@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_is_as_large_as_an_operand(transposed, monkeypatch):
    monkeypatch.setattr(half_products, "_PANEL", 1 << 11)
    monkeypatch.setattr(half_products, "_BLOCK", 1 << 12)
    monkeypatch.setattr(half_products, "_FEWEST_ROWS", 4)
    a, b = torch.ones(300, 256).bfloat16(), torch.ones(256, 200).bfloat16()
    b = b.t().contiguous().t() if transposed else b
    out = torch.empty(300, 200, dtype=torch.bfloat16)
    found = testing.allocated(lambda: half_products.addmm(None, a, b, out))
    assert 0 < found.peak <= 4 * ((1 << 11) + 2 * (1 << 12)) < b.numel()
    assert found.held == 0


@pytest.mark.parametrize("length", [1, 64, 768, 4096, 28672, 1 << 20])
@pytest.mark.parametrize("rows", [1, 50, 1024, 128256])
def test_sizes_of_panels_and_blocks(rows, length):
    panel, block = half_products._steps(1 << 20, rows, length)
    assert 1 <= panel <= min(rows, 1024)
    assert panel * length <= max(1 << 19, 64 * length)
    assert block >= 64
    assert block * max(panel, length) <= max(1 << 20, 64 * length)
    assert half_products._steps(3, rows, length)[1] == 3


def applies(dtype=torch.bfloat16, M=256, N=1024, K=1024, along_rows=True):
    return half_products.applies(dtype, M, N, K, along_rows)


def test_the_rule(slow):
    for dtype in HALVES:
        assert applies(dtype)
        assert applies(dtype, along_rows=False)
    assert not applies(torch.float32)
    assert not applies(torch.float64, along_rows=False)
    # Few tokens: torch's loop along the rows of W is as quick as a copy of W, that across them not.
    assert [M for M in range(1, 9) if applies(M=M)] == [6, 7, 8]
    assert applies(M=1, along_rows=False)
    # Small products are the host's time.
    assert not applies(M=8, N=32, K=32)
    assert not applies(M=8, N=32, K=32, along_rows=False)
    assert not applies(M=8, N=64, K=64)
    assert applies(M=8, N=64, K=64, along_rows=False)
    assert not any(applies(M=M, N=N, along_rows=False) for M, N in ((0, 9), (9, 0)))
    matrix = torch.empty(1024, 1024, dtype=torch.bfloat16)
    assert [half_products.serves(5, b) for b in (matrix, matrix.t())] == [True, False]
    assert half_products.serves(6, matrix.t())
    assert not half_products.serves(6, matrix.t().float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_torch_is_slow_where_it_says_that_onednn_has_no_product(dtype, monkeypatch):
    def answer(supported, x86=True):
        monkeypatch.setattr(torch_internals, "_onednn_supports", lambda dtype: supported)
        monkeypatch.setattr(half_products, "_is_x86", lambda: x86)
        return half_products.torch_is_slow(dtype)

    monkeypatch.setattr(torch_internals, "enabled", True)
    monkeypatch.setattr(torch_internals, "_mkldnn_enabled", lambda: True)
    assert answer(False)
    assert not answer(True)
    # Neither known nor measured.
    assert not answer(None)
    assert not answer(False, x86=False)
    assert not half_products.torch_is_slow(torch.float32)
    # Without oneDNN torch multiplies by its own loops on every processor.
    monkeypatch.setattr(torch_internals, "_mkldnn_enabled", lambda: False)
    assert answer(True)
    assert not answer(None)
    monkeypatch.setattr(torch_internals, "enabled", False)
    assert not answer(False)


@pytest.mark.skipif(not torch_internals.enabled, reason="a torch that is not asked")
def test_what_torch_says_of_this_processor():
    for dtype in HALVES:
        assert torch_internals.onednn_multiplies(dtype) in (True, False)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch_internals.onednn_multiplies(torch.bfloat16) is False


CASES = [
    Case(BY_NAME[form], 21, 35, 27, 5, dtype, dropout, bias=bias, transposed=transposed)
    for dtype in HALVES
    for form, dropout, bias, transposed in (
        ("lora", 0.0, True, False),
        ("lora-bias", 0.3, False, True),
        ("lamda", 0.0, True, False),
        ("dora-inner", 0.3, True, True),
        ("dora-both", 0.3, True, False),
        ("dora-in", 0.0, False, False),
    )
]


@each_name(["cpu", "eager"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_error_rule(case, name, by_panels, monkeypatch):
    monkeypatch.setenv(env.BACKEND.name, name)
    ratios = testing.error_ratios(case, seeds=range(5))
    assert max(ratios.values()) <= 2, ratios
    assert {(case.M, case.K, case.N), (case.M, case.N, case.K)} <= set(by_panels)


@each_name(["cpu", "eager"])
def test_one_token_and_leading_dims(name, by_panels, monkeypatch):
    monkeypatch.setenv(env.BACKEND.name, name)
    W, A, B = torch.randn(33, 40).bfloat16(), torch.randn(3, 40), torch.randn(33, 3)
    x = torch.randn(2, 1, 40).bfloat16().requires_grad_()
    y = lorafast.linear(x, W, None, A, B)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.shape == (2, 1, 33)
    assert not y._is_view()
    # `cpu` has a kernel of its own for few tokens, forward.
    expected = {(2, 33, 40)} if name == "cpu" else {(2, 40, 33), (2, 33, 40)}
    assert expected <= set(by_panels)
    wide = W.double() + B.double() @ A.double()
    torch.testing.assert_close(y.double(), x.double() @ wide.t(), rtol=0.02, atol=0.1)
    torch.testing.assert_close(dx.double(), wide.sum(0).expand(2, 1, 40), rtol=0.02, atol=0.1)


@needs_compiler
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_an_adapter_at_its_start_changes_no_bit_of_the_product(dtype, by_panels):
    x, W, bias = (torch.randn(shape).to(dtype) for shape in ((19, 40), (33, 40), (33,)))
    h, B = torch.randn(19, 4).to(dtype), torch.zeros(33, 4)
    alone, _ = cpu.linear(x, W, [], None, bias)
    adapted, _ = cpu.linear(x, W, [UpProj(h, B)], None, bias)
    assert torch.equal(adapted, alone)
    assert len(by_panels) == 2


@needs_compiler
def test_two_base_terms_are_summed(by_panels):
    dys = [whole_numbers(19, 33, torch.bfloat16, most=1) for _ in range(2)]
    W = whole_numbers(33, 40, torch.bfloat16, most=1)
    found = cpu.grad_input([BaseTerm(dy, W) for dy in dys], [])
    assert torch.equal(found.double(), (dys[0] + dys[1]).double() @ W.double())
    assert by_panels == [(19, 33, 40)] * 2


@needs_compiler
def test_explain_names_the_panels(slow):
    layer = lorafast.Linear(256, 384, adapter=lorafast.LoRA(r=4), dtype=torch.bfloat16)
    isa = cpu.library().ISA
    said = str(lorafast.explain(layer, tokens=64))
    assert f"linear, grad_input by cpu: {isa}, the base product by panels in fp32" in said
    assert f"grad_output, grad_project by cpu: {isa}" in said
    notes = lorafast.explain(layer, tokens=3).rows[0].notes
    assert f"linear by cpu: {isa}, y in one kernel" in notes
    assert f"grad_input by cpu: {isa}, the base product by panels in fp32" in notes
    assert "panels" not in str(lorafast.explain(layer.float(), tokens=2048))


def test_explain_names_the_panels_of_eager(slow, monkeypatch):
    monkeypatch.setenv(env.BACKEND.name, "eager")
    layer = lorafast.Linear(256, 384, adapter=lorafast.LoRA(r=4), dtype=torch.float16)
    said = str(lorafast.explain(layer, tokens=64))
    assert "linear, grad_input by eager: the base product by panels in fp32" in said
    on_gpu = problem(arch=Arch("nvidia", "sm_90"), dtype=torch.float16, M=64)
    assert half_products.describe_route("linear", replace(on_gpu, arch=Arch("cpu", "x86_64")))
    assert half_products.describe_route("linear", on_gpu) is None


def test_few_tokens_go_by_the_op_where_torchs_products_are_slow(slow, monkeypatch):
    x, W = torch.randn(8, 256).bfloat16(), torch.randn(256, 256).bfloat16()
    A, B = torch.randn(4, 256).bfloat16(), torch.randn(256, 4).bfloat16()

    def served(x, W):
        return plain_products.linear(x, W, None, A.to(x.dtype), B.to(x.dtype), None, 1.0)

    def why_not(M, dtype):
        tensors = LayerTensors(W.to(dtype), lora_A=A.to(dtype), lora_B=B.to(dtype))
        return plain_products.why_not(M, tensors, CallOptions(), dtype)

    assert served(x, W) is None
    assert why_not(8, x.dtype) == "torch has no quick product in torch.bfloat16 here"
    # The limit of 2^17 multiply-adds, and what is not slow.
    assert served(x[:2], W) is not None
    assert why_not(2, x.dtype) is None
    assert why_not(3, x.dtype) is not None
    assert served(x.float(), W.float()) is not None
    assert why_not(8, torch.float32) is None
    assert why_not(1 << 20, x.dtype) == f"{1 << 20} tokens are not few"
    monkeypatch.setattr(half_products, "torch_is_slow", lambda dtype: False)
    assert served(x, W) is not None
    assert why_not(8, x.dtype) is None
