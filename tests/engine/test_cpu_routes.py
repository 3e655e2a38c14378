"""The C++ backend refused, forced and not built."""

import warnings

import pytest
import torch
from helpers.backends import problem
from helpers.cpp_compiler import needs_compiler

import lorafast
from lorafast.engine import dispatch, host, plain_products
from lorafast.engine.backends import cpu
from lorafast.runtime import extension, fallback, instruction_sets
from lorafast.runtime.devices import Arch

pytestmark = [needs_compiler, pytest.mark.usefixtures("few_tokens_by_op")]


def forget():
    """As a new process would have it."""
    for cache in (dispatch._routes, cpu.library, extension._cpu):
        cache.cache_clear()


@pytest.fixture
def anew(monkeypatch):
    """A setter of the environment that no choice made before outlives."""
    kept = cpu.library()
    forget()

    def use(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        forget()

    yield use
    monkeypatch.undo()
    forget()
    # What was loaded before stays what the process has.
    assert isinstance(kept, str) or cpu.library().ISA == kept.ISA


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"arch": Arch("nvidia", "sm_90")}, "runs on CPU tensors; this is nvidia sm_90"),
        ({"arch": Arch("mps", "mps")}, "runs on CPU tensors; this is mps"),
        (
            {"dtype": torch.float64},
            "x is torch.float64; the kernels compute in torch.float32, torch.bfloat16, "
            "torch.float16",
        ),
        ({"weight_dtype": torch.int8}, "weight is torch.int8"),
        ({"factor_dtype": torch.float64}, "a factor is torch.float64"),
        ({"R": (8, 249)}, "R=8 + 249 exceeds 256, the largest rank of one call"),
    ],
)
def test_every_refusal_has_its_reason(fields, why):
    # The primitive is not read: tests/contracts asks for each of them.
    assert cpu.why_not("linear", problem(R=(8, 248))) == ()
    (reason,) = cpu.why_not("linear", problem(**fields))
    assert why in reason


def test_reasons_add_up_and_a_problem_it_cannot_serve_compiles_nothing(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: pytest.fail("built for nothing"))
    assert (
        len(
            cpu.why_not(
                "linear", problem(dtype=torch.float64, factor_dtype=torch.float64, R=(300,))
            )
        )
        == 3
    )


def test_forcing_it_on_what_it_cannot_raises_with_every_reason(anew):
    anew(LORAFAST_BACKEND="cpu")
    x, W, A, B = (
        torch.randn(2, 8).double(),
        torch.randn(4, 8).double(),
        torch.randn(300, 8),
        torch.randn(4, 300),
    )
    with pytest.raises(
        RuntimeError,
        match=r"LORAFAST_BACKEND=cpu cannot project: "
        r"x is torch.float64.*; weight is .*; R=300 exceeds 256",
    ):
        lorafast.linear(x, W, None, A, B)


def test_what_cannot_be_built_is_a_reason_and_auto_runs_on_eager(anew, tmp_path):
    # Not yet there; and no compiler to put anything there.
    anew(LORAFAST_CACHE=str(tmp_path / "cache"), CXX=str(tmp_path / "no-such-compiler"))
    layer = lorafast.Linear(24, 32, adapter=lorafast.LoRA(r=4))
    said = str(lorafast.explain(layer))
    assert "no-such-compiler" in next(
        line for line in said.splitlines() if line.startswith("not cpu:")
    )
    assert set(lorafast.explain(layer).rows[0].backends.values()) == {"eager"}
    assert layer(torch.randn(3, 24)).isfinite().all()
    anew(LORAFAST_BACKEND="cpu")
    with pytest.raises(
        RuntimeError, match=r"LORAFAST_BACKEND=cpu cannot project: .*no-such-compiler"
    ):
        layer(torch.randn(3, 24))


@pytest.mark.parametrize(("asked", "error"), [("sse9", ValueError), ("avx512bf16", RuntimeError)])
def test_an_instruction_set_there_is_not_raises_as_a_backend_does(asked, error, anew, monkeypatch):
    monkeypatch.setattr(instruction_sets, "available", lambda: ("avx2", "scalar"))
    anew(LORAFAST_CPU_ISA=asked)
    layer = lorafast.Linear(24, 32, adapter=lorafast.LoRA(r=4))
    for _ in range(2):
        with pytest.raises(error, match=f"^LORAFAST_CPU_ISA={asked} .* avx2, scalar"):
            layer(torch.randn(3, 24))
    # It is of no interest to another backend.
    anew(LORAFAST_BACKEND="eager")
    assert layer(torch.randn(3, 24)).isfinite().all()


@pytest.fixture
def plainly(monkeypatch):
    """In a process that has made no call, few tokens take plain products."""
    if why := extension.why_unused():
        # Then few tokens never need a kernel.
        pytest.skip(why)
    monkeypatch.setattr(plain_products, "MOST_ELEMENTS", 2**18)
    monkeypatch.setattr(host, "linear", host._first_call)
    monkeypatch.setattr(fallback, "_to_issue", [True])


def ours():
    return lorafast.Linear(24, 32, adapter=lorafast.LoRA(r=4))


def accelerated():
    peft = pytest.importorskip("peft")
    base = torch.nn.Sequential(torch.nn.Linear(24, 32))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0"]))
    lorafast.accelerate(model)
    return model


MADE = [ours, pytest.param(accelerated, marks=pytest.mark.peft)]


@pytest.mark.parametrize("make", MADE)
def test_an_unknown_instruction_set_raises_where_no_kernel_is_needed(make, anew, plainly):
    model = make()
    anew(LORAFAST_CPU_ISA="sse9")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^LORAFAST_CPU_ISA=sse9 "):
            model(torch.randn(3, 24))


@pytest.mark.parametrize("make", MADE)
def test_a_missing_compiler_is_said_where_no_kernel_is_needed(make, anew, plainly, monkeypatch):
    missing = fallback.Remediable("no compiler; install g++")
    monkeypatch.setattr(cpu, "library", lambda: missing)
    model = make()
    with pytest.warns(lorafast.FallbackWarning, match=r"eager backend serves: no compiler"):
        model(torch.randn(3, 24))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, 24))
