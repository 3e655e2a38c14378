"""The model of a training step: it notes what the backends do, and touches nothing else."""

import contextlib
import functools
import itertools
import os
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.pretended_gpu import verdicts
from torch.nn import functional as F

import lorafast
from lorafast.engine import cuda_forms, dispatch, formula, kernel_choice, step_model
from lorafast.engine.backends import eager
from lorafast.engine.kernels import configs, gpu_specs, launch, loop_counts, modelled
from lorafast.engine.kernels.modelled import Machine, Work
from lorafast.engine.modelled_forms import ModelledForms
from lorafast.engine.problem import CallOptions, GradMask, LayerTensors
from lorafast.runtime import devices

triton = pytest.importorskip("lorafast.engine.backends.triton")

H200 = modelled.H200
A100 = devices.Arch("nvidia", "sm_80", 108)
SMALL = Machine(A100, gpu_specs.device(A100))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NO_KERNEL = frozenset()
ALL = frozenset(
    {"drop", "project", "linear", "grad_output", "grad_input", "grad_project", "row_norm"}
)


def layer(M=2048, N=1024, K=1024, R=16, method="LoRA", dtype=BF16, factors=FP32, p=0.0, **more):
    """One layer of bf16 as explain would ask for it."""

    def empty(*shape, dtype=factors):
        return torch.empty(*shape, dtype=dtype, device="meta")

    options = CallOptions(2.0, p, **more.pop("options", {}))
    tensors = LayerTensors(empty(N, K, dtype=dtype), None, empty(R, K), empty(N, R))
    needs = {"x": True, "lora_A": True, "lora_B": True}
    if method == "DoRA":
        tensors = tensors._replace(magnitude=empty(N, dtype=FP32))
        needs["magnitude"] = True
    elif method != "LoRA":
        core = empty(R, R) if method == "LaMDA" else empty(R)
        tensors, needs = tensors._replace(core=core), needs | {"core": True, "lora_A": False}
    needs |= more.pop("needs", {})
    for name, shape in more.items():
        tensors = tensors._replace(**{name: empty(*shape)})
    return step_model.layer_of(M, tensors, options, GradMask(**needs))


# For each kernel that passes over a large operand: the name of its argument.
LARGE = {
    "project": "x_ptr", "grad_project": "x_ptr", "low_rank_add": "out_ptr",
    "grad_output": "dy_ptr", "row_norm": "W_ptr", "drop": "x_ptr",
}  # fmt: skip


def loop_of(kernel, named):
    """The name of a launch's loop in loop_counts."""
    if kernel in ("project", "grad_project"):
        return kernel + ", dropout" * bool(named["DROPS"])
    if kernel in ("low_rank_add", "drop"):
        return kernel + ", accumulated" * bool(named["ACCUMULATES"])
    if kernel == "row_norm":
        return f"row_norm, {'rows' if named['BY_ROW'] else 'columns'}"
    return "grad_output" + ("", ", bias", ", kept")[named["SUMS"]]


@contextlib.contextmanager
def real_wrappers(note, machine):
    """The launches of the Triton backend itself are noted on meta tensors, and not made."""

    def run(kernel, grid, tile, *args, **constants):
        named = dict(zip(kernel.arg_names, args, strict=False)) | constants
        name = kernel.fn.__name__.removesuffix("_kernel")
        # What stands in for an absent tensor shares its memory with another, and is not read.
        moved = {}
        for tensor in (one for one in args if isinstance(one, torch.Tensor)):
            place = tensor.untyped_storage()._cdata
            moved[place] = max(moved.get(place, 0), modelled.bytes_of(tensor))
        moved = sum(moved.values())
        if name not in LARGE:
            note(modelled.small(name, moved, machine.specs))
            return
        if named.get("ACCUMULATES"):
            moved += modelled.bytes_of(named["out_ptr"])
        large, R = named[LARGE[name]], 0 if name in ("drop", "low_rank_add") else tile.BLOCK_R
        loop = loop_of(name, named)
        note(modelled.stream(name, loop, R, large.numel(), moved, machine.specs))

    def gemm(out, summands, masked, route, gain=None, bias=None, inner=None):
        terms = [*summands, *([masked] if masked else [])]
        tensors = [
            out,
            *(t for term in terms for t in term[:2]),
            *([] if inner is None else [inner]),
        ]
        depths, moved = [term.a.shape[1] for term in terms], sum(map(modelled.bytes_of, tensors))
        note(modelled.gemm(route.form, out.numel(), depths, moved, bool(masked), machine.specs))
        if route.splits > 1:
            parts = 8 * route.splits * out.numel()
            note(modelled.small("gemm_finish", parts, machine.specs))

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (launch, "run", run),
            (triton, "gemm", gemm),
            (kernel_choice, "measured_specs", lambda *_: machine.routing),
            (launch, "arch_of", lambda x: machine.arch),
            (triton, "devices", SimpleNamespace(of=lambda device: machine.arch)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def works(of, machine, wrappers):
    """What a step notes where the kernels compute all of it."""
    noted = []

    class Kept(step_model.Trace):
        def __init__(self, machine):
            super().__init__(machine)
            noted.append(self)

    step_model.step.cache_clear()
    with mock.patch.object(step_model, "Trace", Kept), contextlib.ExitStack() as stack:
        if wrappers:
            stack.enter_context(real_wrappers(lambda work: noted[0].works.append(work), machine))
            stack.enter_context(mock.patch.object(step_model, "ModelledKernels", Wrapped))
        step_model.step(of, machine, ALL, True)
    step_model.step.cache_clear()
    return noted[0].works


class Wrapped:
    """The Triton backend, as step_model asks for ModelledKernels."""

    def __init__(self, note, machine):
        pass

    def __getattr__(self, primitive):
        from lorafast.engine.kernels.drop import drop

        return drop if primitive == "drop_into" else getattr(triton, primitive)


FORMS = [
    {},
    {"p": 0.05},
    {"method": "DoRA", "options": {"keep": "output"}},
    {"method": "DoRA", "p": 0.05, "options": {"keep": "inner", "dropout_on": "both"}},
    {"method": "DoRA", "p": 0.05, "options": {"keep": "recompute"}, "lora_bias": (1024,)},
    {"method": "DoRA", "options": {"axis": "in"}, "R": 40},
    {"method": "LaMDA", "options": {"frozen_columns": 5}},
    {"method": "LaMDA", "R": 72, "p": 0.3},
    {"method": "VeRA", "out_scale": (1024,), "needs": {"out_scale": True}},
    {"bias": (1024,), "needs": {"bias": True}, "R": 24},
    {"R": 200, "factors": BF16, "p": 0.05},
    {"M": 8192, "N": 4096, "K": 4096, "R": 64, "p": 0.05},
    {"M": 64, "K": 1019, "R": 8, "p": 0.05},
]


@pytest.mark.parametrize("form", FORMS, ids=[str(i) for i in range(len(FORMS))])
def test_the_launches_are_those_of_the_triton_backend(form):
    for dtype, machine in itertools.product((BF16, FP16), (H200, SMALL)):
        of = layer(dtype=dtype, **form)
        found, made = (works(of, machine, wrappers) for wrappers in (False, True))
        assert found == made
        assert any(work.name == "grad_output" for work in found)


def seconds(of, served=NO_KERNEL, mask=True, machine=H200):
    """The modelled ratio of a layer's step to the frozen layer's."""
    return step_model.step(of, machine, served, mask).seconds / step_model.frozen(
        of.M, of.weight, False, machine
    )


def test_a_product_and_a_copy_take_what_the_machine_says():
    with step_model.Trace(H200) as trace:
        a, b = (torch.empty(8192, 8192, dtype=BF16, device="meta") for _ in range(2))
        torch.mm(a, b)
        torch.empty_like(a).copy_(b)
        torch.cat([a, b])
    product, copy, cat = trace.works
    assert product == Work("mm", 3 * 2 * 8192**2, 2 * 8192**3 / 790e12)
    assert copy == Work("copy_", 2 * 2 * 8192**2, 4 * 8192**2 / 4.3e12)
    assert cat.bytes == 4 * 2 * 8192**2
    assert trace.seconds == pytest.approx(sum(work.seconds for work in trace.works) + 3 * 1.5e-6)


def test_more_work_is_modelled_as_more():
    plain = seconds(layer())
    dora = seconds(layer(method="DoRA", options={"keep": "output"}))
    assert 1 < plain < seconds(layer(R=64)) < dora
    assert plain < seconds(layer(p=0.05)) < seconds(layer(p=0.05), mask=False)
    assert seconds(layer(p=0.05), ALL) < seconds(layer(p=0.05))
    both = layer(method="DoRA", p=0.05, options={"keep": "inner", "dropout_on": "both"})
    once = layer(method="DoRA", p=0.05, options={"keep": "inner"})
    assert seconds(both) > seconds(once) + 0.5
    exact = layer(method="DoRA", options={"keep": "output"}, needs={"norm": True})
    assert seconds(exact) > dora


def test_the_model_prefers_what_it_expects_to_be_faster():
    of = layer(M=8192, N=4096, K=4096, p=0.05)
    chosen = step_model.step(of, H200, None, True)
    kernels = frozenset(name for name, way in chosen.took.items() if way == "kernels")
    assert kernels == {"project", "grad_output", "grad_project", "grad_input"}
    assert chosen.seconds == step_model.step(of, H200, kernels, True).seconds
    assert seconds(of, kernels) == pytest.approx(1.17, abs=0.005)


def cuda_launches(of, real):
    """What the cuda backend launches in a step of a layer. real: of CPU tensors, not of meta."""
    launches = []

    def note(form, grid, *arguments):
        tensors = [step_model.Part.of(t) for t in arguments if isinstance(t, torch.Tensor)]
        launches.append((form, grid, tensors))

    if not real:
        with mock.patch.object(ModelledForms, "launch", lambda _, *launch: note(*launch)):
            step_model.step.cache_clear()
            step_model.cuda_step(of, H200)
        step_model.step.cache_clear()
        return launches
    tensors = [part and torch.zeros(part.shape, dtype=part.dtype) for part in of.parts]
    tensors = LayerTensors(*tensors)
    (N, K), dtype = of.weight.shape, of.weight.dtype
    x, dy = (torch.zeros(of.M, size, dtype=dtype) for size in (K, N))
    arch = devices.Arch("nvidia", "sm_90", 132)
    loaded = mock.Mock(side_effect=lambda form, device: functools.partial(note, form))
    with (
        mock.patch.object(cuda_forms, "loaded", loaded),
        mock.patch.object(cuda_forms, "why_not", return_value=""),
        mock.patch.object(devices, "of", return_value=arch),
        mock.patch.dict(os.environ, {"LORAFAST_BACKEND": "cuda"}),
    ):
        if tensors.magnitude is not None:
            tensors = tensors._replace(norm=formula.row_norm(tensors, of.options))
        y, h, z = formula.forward(x, tensors, of.options)
        kept = y if of.options.keep == "output" else z
        formula.backward(dy, x, h, kept, tensors, of.options, of.needs)
    return launches


@pytest.mark.parametrize(
    "form",
    [
        {"M": 64},
        {"M": 16},
        {"M": 3, "K": 4096, "method": "DoRA", "options": {"keep": "output"}},
        {"p": 0.05},
        {"method": "DoRA", "p": 0.05, "options": {"keep": "output"}},
        {"method": "LaMDA", "options": {"frozen_columns": 5}},
        {"method": "LaMDA", "R": 72, "p": 0.3},
        {"bias": (1024,), "needs": {"bias": True}, "R": 24},
        {"M": 100, "K": 1019, "R": 8, "p": 0.05},
    ],
    ids=str,
)
def test_the_launches_are_those_of_the_cuda_backend(form):
    of = layer(**{"M": 256, **form})
    modelled_so, made = (cuda_launches(of, real) for real in (False, True))
    assert modelled_so == made
    assert {"project", "low_rank_add"} <= {launch[0].stem for launch in made}


def cuda_works(of):
    """The works of a modelled step by the cuda backend."""
    noted = []

    class Kept(step_model.Trace):
        def __init__(self, machine):
            super().__init__(machine)
            noted.append(self)

    step_model.step.cache_clear()
    with mock.patch.object(step_model, "Trace", Kept):
        seconds = step_model.cuda_step(of, H200)
    step_model.step.cache_clear()
    assert seconds == noted[0].seconds
    return noted[0].works


def test_a_pass_of_the_cuda_backend_takes_its_bytes_or_what_is_on_its_way():
    M = N = 4096
    works = cuda_works(layer(M=M, N=N, K=N))
    # h, the fp32 factor, and y, which is written before the product is added to it.
    moved = 2 * (M * 16 + M * N) + 4 * N * 16
    assert [work.bytes for work in works if work.name == "low_rank_add"] == [moved] * 2
    small = [work.seconds for work in works if work.name in ("scale", "sum_parts")]
    assert small == [modelled.LEAST]
    works = cuda_works(layer(M=M, N=N, K=N, factors=BF16))
    project = next(work for work in works if work.name == "project")
    # 128 blocks of 32 rows, twice for the parts of the sum.
    in_flight = loop_counts.FORMS["project", 6].in_flight * 256 / modelled.LATENCY
    read = 2 * (M * N + 16 * N)
    assert project.seconds == pytest.approx(read / in_flight, rel=1e-4)
    assert project.seconds > project.bytes / 4.3e12


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_the_cuda_backends_steps_stay_below_their_goals(p):
    for method, goal in (("LoRA", 1.15), ("DoRA", 1.22)):
        of = layer(8192, 4096, 4096, 16, method, p=p, options={"keep": "output"})
        ratio = step_model.cuda_step(of, H200) / step_model.frozen(of.M, of.weight, False, H200)
        assert ratio <= goal, (method, ratio)


def test_a_form_whose_loop_is_not_counted_is_refused():
    for of in (layer(R=24), layer(K=1019)):
        with pytest.raises(ValueError, match="no counted loop in kernels/loop_counts"):
            step_model.cuda_step(of, H200)


def test_meta_tensors_outside_a_model_are_served_as_ever():
    x = torch.empty(5, 1024, dtype=BF16, device="meta", requires_grad=True)
    weight, A, B = (
        torch.empty(*s, dtype=BF16, device="meta") for s in ((8, 1024), (4, 1024), (8, 4))
    )
    other = []

    def outside():
        assert not devices.has_mixed_gemm(x.device)
        other.append(dispatch.routes(x, LayerTensors(weight, None, A, B), CallOptions())["linear"])

    def inside(*_):
        # In the middle of a modelled step, and in another thread.
        thread = threading.Thread(target=outside)
        thread.start()
        thread.join()
        return F.linear(x, weight), None

    outside()
    before = dispatch.routes(x, LayerTensors(weight, None, A, B), CallOptions())
    with mock.patch.object(step_model.Chosen, "linear", inside, create=True):
        step_model.step.cache_clear()
        step_model.step(layer(M=5, N=8, factors=BF16, R=4), H200, ALL, True)
    outside()
    assert other == [eager] * 3
    assert before["linear"] is eager


def test_nothing_is_modelled_for_a_cpu_or_in_full_precision(monkeypatch):
    cpu = torch.device("cpu")
    assert step_model.machine_of(cpu, BF16) is None
    monkeypatch.setattr(devices, "of", lambda device: modelled.H200_ARCH)
    published = gpu_specs.device(modelled.H200_ARCH)._replace(tma_speed=0.0, pointers_speed=0.0)
    assert step_model.machine_of(cpu, BF16).specs == published
    assert step_model.machine_of(cpu, FP32) is None
    monkeypatch.setattr(devices, "of", lambda device: devices.Arch("amd", "gfx942", 304))
    assert step_model.machine_of(cpu, BF16) is None


def test_what_a_trial_has_measured_is_in_the_place_of_what_is_published(monkeypatch):
    unknown = devices.Arch("nvidia", "sm_121", 48)
    monkeypatch.setattr(devices, "of", lambda device: unknown)
    with lorafast.engine.trial.assuming(verdicts()):
        found = step_model.machine_of(torch.device("cpu"), BF16)
    assert (found.specs.bandwidth, found.specs.half_flops) == (4e12, 7e14)
    assert found.routing == found.specs
    assert found.specs.multiprocessors == 48


@pytest.mark.slow
def test_the_loops_are_counted_for_every_block_of_ranks():
    for kernel in ("project", "grad_project", "grad_output", "row_norm, rows", "row_norm, columns"):
        assert {R for loop, R in modelled.LOOPS if loop == kernel} == set(configs.BLOCKS_R)
