"""The C++ backend refused, forced and not built; and methods that train on it."""

import pytest
import torch
from helpers.cpp_compiler import needs_compiler

import lorafast
from lorafast.engine import dispatch
from lorafast.engine.backends import cpu
from lorafast.engine.problem import Problem
from lorafast.runtime import devices, env, extension
from lorafast.runtime.devices import Arch

pytestmark = needs_compiler


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


def problem(**fields):
    known = {
        "arch": Arch("cpu", "cpu"),
        "dtype": torch.bfloat16,
        "M": 64,
        "K": 32,
        "N": (32,),
        "R": (8,),
    }
    return Problem(
        **(known | {"weight_dtype": torch.bfloat16, "factor_dtype": torch.float32} | fields)
    )


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"arch": Arch("nvidia", "sm_90")}, "runs on CPU tensors; this is nvidia sm_90"),
        ({"arch": Arch("mps", "mps")}, "runs on CPU tensors; this is mps mps"),
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


@pytest.mark.parametrize("asked", ["sse9", "avx512bf16"])
def test_an_instruction_set_there_is_not_is_a_reason(asked, anew, monkeypatch):
    monkeypatch.setattr(devices, "isas", lambda: ("avx2", "scalar"))
    anew(LORAFAST_CPU_ISA=asked)
    (reason,) = cpu.why_not("linear", problem())
    assert reason.startswith(f"{env.CPU_ISA.name}={asked}")
    assert cpu.describe_route("linear", problem()) is None


@pytest.mark.parametrize(
    "adapter",
    [
        lorafast.LoRA(r=4, dropout=0.2),
        lorafast.DoRA(r=4, dropout=0.2),
        lorafast.LaMDA(r=4, dropout=0.2),
        lorafast.VeRA(r=8, dropout=0.2),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
def test_methods_train_through_it_as_through_eager(adapter, anew):
    def walk():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            lorafast.Linear(24, 32, adapter=adapter),
            torch.nn.ReLU(),
            lorafast.Linear(32, 8, adapter=adapter),
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        x, target = torch.randn(40, 24), torch.randn(40, 8)
        losses = []
        for _ in range(6):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, str(lorafast.explain(model))

    anew(LORAFAST_BACKEND="cpu")
    ours, said = walk()
    assert "not cpu" not in said
    anew(LORAFAST_BACKEND="eager")
    theirs, _ = walk()
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]
