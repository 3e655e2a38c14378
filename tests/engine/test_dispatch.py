"""Routes: auto may fall back, a forced backend raises with every reason, and nothing is silent."""

import types

import pytest
import torch

import lorafast
from lorafast.engine import dispatch
from lorafast.engine.backends import eager
from lorafast.engine.problem import PRIMITIVES, CallOptions, LayerTensors, Problem
from lorafast.runtime import devices, env, symlinks

X86 = Problem(
    devices.Arch("cpu", "cpu"), torch.float32, 8, 6, (5,), (2,), torch.float32, torch.float32
)


@pytest.fixture
def clean(monkeypatch):
    """Two backends before eager: one that does not exist, and one for a test to fill."""
    monkeypatch.setattr(dispatch, "ORDER", ("absent", "partial", "eager"))
    dispatch._routes.cache_clear()
    yield monkeypatch
    dispatch._routes.cache_clear()


def fake(**refusals):
    """A backend that refuses some primitives."""
    served = {primitive: lambda: None for primitive in PRIMITIVES}
    return types.SimpleNamespace(
        why_not=lambda primitive, problem: refusals.get(primitive, ()), **served
    )


def with_backend(monkeypatch, module):
    real = dispatch.load
    monkeypatch.setattr(
        dispatch, "load", lambda backend: module if backend == "partial" else real(backend)
    )


@pytest.mark.parametrize(
    ("shape", "transposed"), [((5, 6), False), ((1, 6), False), ((5, 1), False)]
)
def test_the_weights_layout_is_part_of_the_problem(shape, transposed):
    N, K = shape
    t = LayerTensors(torch.empty(N, K), lora_A=torch.empty(2, K), lora_B=torch.empty(N, 2))
    assert dispatch.problem_of(torch.empty(3, K), t, CallOptions()).transposed is transposed
    lying = t._replace(weight=torch.empty(K, N).t())
    assert dispatch.problem_of(torch.empty(3, K), lying, CallOptions()).transposed is (
        N > 1 and K > 1
    )


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_eager_serves_everything(clean, primitive):
    assert dispatch.pick(primitive, X86) is eager
    assert callable(getattr(eager, primitive))


def test_the_first_able_backend_serves(clean):
    able = fake(linear=("rank 2 < 8", "int8"))
    with_backend(clean, able)
    assert dispatch.pick("project", X86) is able
    assert dispatch.pick("linear", X86) is eager
    assert dispatch.why_not("partial", "linear", X86) == ("rank 2 < 8", "int8")


def test_a_forced_backend_raises_with_every_reason(clean):
    with_backend(clean, fake(linear=("rank 2 < 8", "int8")))
    clean.setenv("LORAFAST_BACKEND", "partial")
    with pytest.raises(
        RuntimeError, match="LORAFAST_BACKEND=partial cannot linear: rank 2 < 8; int8"
    ):
        dispatch.pick("linear", X86)
    assert dispatch.pick("project", X86)


def test_a_forced_backend_that_is_not_there_raises(clean):
    clean.setenv("LORAFAST_BACKEND", "absent")
    with pytest.raises(
        RuntimeError, match="LORAFAST_BACKEND=absent cannot linear: not written yet"
    ):
        dispatch.pick("linear", X86)


def test_an_unknown_backend_is_named(clean):
    clean.setenv("LORAFAST_BACKEND", "cudnn")
    with pytest.raises(
        ValueError, match="LORAFAST_BACKEND=cudnn is not one of auto, absent, partial, eager"
    ):
        dispatch.pick("linear", X86)
    clean.setenv("LORAFAST_BACKEND", "aeger")
    with pytest.raises(ValueError, match=r"; did you mean eager\?$"):
        dispatch.pick("linear", X86)


def test_the_choice_is_printed_once_per_problem(clean, capsys):
    clean.setenv("LORAFAST_LOG", "1")
    for _ in range(3):
        dispatch.pick("linear", X86)
    said = capsys.readouterr().err
    assert (
        said.count(
            "lorafast: linear -> eager; "
            "not absent (not written yet (nothing is missing from this installation)), "
            "partial (not written"
        )
        == 1
    )


def test_printing_may_be_switched_on_later(clean, capsys):
    dispatch.pick("linear", X86)
    clean.setenv("LORAFAST_LOG", "1")
    dispatch.pick("linear", X86)
    assert "linear -> eager" in capsys.readouterr().err


def test_a_backend_without_the_primitive_has_not_got_it(clean):
    half = types.SimpleNamespace(why_not=lambda *_: (), row_norm=lambda: None)
    with_backend(clean, half)
    assert dispatch.pick("row_norm", X86) is half
    assert dispatch.why_not("partial", "linear", X86) == ("has no linear",)
    assert dispatch.pick("linear", X86) is eager


def test_reasons_are_a_tuple(clean):
    with_backend(clean, fake(linear="no"))
    with pytest.raises(
        TypeError, match=r"partial\.py: why_not must return a tuple of reasons, not 'no'"
    ):
        dispatch.pick("linear", X86)


@pytest.mark.parametrize(
    "error",
    [ImportError("no triton"), OSError("libcuda.so.1: cannot open"), SyntaxError("half-written")],
)
def test_a_backend_that_fails_to_load_is_a_reason(clean, error):
    def broken(name):
        raise error

    dispatch.load.cache_clear()
    clean.setattr(dispatch.importlib, "import_module", broken)
    clean.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    try:
        assert dispatch.why_not("triton", "linear", X86) == (
            f"cannot be loaded: {type(error).__name__}: {error}",
        )
    finally:
        dispatch.load.cache_clear()


def test_the_environment_is_read_at_each_call(clean):
    assert env.backend() == "auto"
    clean.setenv("LORAFAST_BACKEND", " Eager ")
    assert env.backend() == "eager"
    assert not env.log()
    clean.delenv("LORAFAST_BACKEND")
    assert env.backend() == "auto"
    clean.setenv("LORAFAST_LOG", "1")
    assert env.log()


def test_a_layer_hears_of_a_change_at_its_next_call(clean):
    layer, x = lorafast.Linear(6, 5), torch.randn(3, 6)
    layer(x)
    clean.setenv("LORAFAST_BACKEND", "absent")
    with pytest.raises(RuntimeError, match="LORAFAST_BACKEND=absent cannot project"):
        layer(x)
    clean.delenv("LORAFAST_BACKEND")
    layer(x)


def test_calls_of_one_problem_share_their_routes():
    t = LayerTensors(
        torch.empty(5, 6), lora_A=torch.empty(2, 6), lora_B=torch.empty(5, 2), core=torch.empty(2)
    )
    c = CallOptions(dropout=0.5, frozen_columns=1)
    problem = dispatch.problem_of(torch.empty(3, 6), t, c)
    assert isinstance(problem, Problem)
    assert (problem.M, problem.R, problem.core, problem.dropout) == (3, (2,), "diagonal", 0.5)
    routes = dispatch.routes(torch.empty(3, 6), t, c)
    other = dispatch.routes(torch.empty(1, 3, 6), t, c._replace(frozen_columns=0))
    assert routes is other
    assert routes is not dispatch.routes(torch.empty(4, 6), t, c)
    assert dispatch.problem_of(torch.empty(3, 6), t, c) == problem
    norm = dispatch.norm_problem_of(t, CallOptions(axis="in"))
    assert (norm.M, norm.gain, norm.core, norm.dropout) == (0, "in", "none", 0.0)


def test_a_lost_link_says_how_to_mend_it(tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "kernels").write_text("../../kernels")
    assert "git config core.symlinks true" in symlinks.why_missing("kernels", tmp_path)
    assert "incomplete" in symlinks.why_missing("csrc", tmp_path)
    (tmp_path / "bench").mkdir()
    assert symlinks.why_missing("bench", tmp_path) is None
    assert all(symlinks.why_missing(room) is None for room in symlinks.LINKS)
