"""The C++ kernels on several threads, called by several, and in a forked process."""

import multiprocessing
import threading

import pytest
import torch
from helpers.cpp_compiler import needs_compiler
from helpers.integer_problems import DTYPES, exact_gains, whole_numbers
from helpers.triton_interpreter import SEED

from lorafast.engine.backends import cpu
from lorafast.engine.problem import BaseTerm, DownProj, LowRankTerm, UpProj, UpProjGradSpec

pytestmark = needs_compiler
# Enough for more than one share of the tokens and group of the columns, and ends that are ragged.
M, N, K, R = 307, 1101, 523, 9


@pytest.fixture
def threads():
    """torch.set_num_threads, for this test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tensors(dtype):
    """Normal numbers, so that the order of a sum shows.

    Whole ones for torch's own product, which promises no order.
    """
    normal = {
        "h": (M, R),
        "A": (R, K),
        "B": (N, R),
        "core": (R, R),
        "kept": (M, N),
        "v": (M, R),
        "normal": (M, K),
        "normal_W": (N, K),
    }
    made = {
        name: torch.randn(shape).to(dtype if shape[0] == M else torch.float32)
        for name, shape in normal.items()
    }
    return made | {
        "x": whole_numbers(M, K, dtype, most=1),
        "W": whole_numbers(N, K, dtype, most=1),
        "dy": whole_numbers(M, N, dtype, most=1),
        "gain": exact_gains(N),
    }


def outcome(h, A, B, core, kept, v, normal, normal_W, x, W, dy, gain):
    """What all six primitives make of them, laid flat."""
    back = UpProjGradSpec(B, 0.3, None, core, h, want_B=True, want_core=True)
    sums = cpu.grad_output(kept, [back], gain, kept, want_bias=True)
    lows = [LowRankTerm(v, A), LowRankTerm(v, A, SEED, 0.3)]
    return [
        *sum(cpu.project(normal, [DownProj(A, core), DownProj(A, None, SEED, 0.3)]), ()),
        *cpu.linear(x, W, [UpProj(h, B, 0.3)], gain + 0.1, gain, keep_inner=True),
        *cpu.linear(normal[:9], normal_W, [UpProj(h[:9], B, 0.3)], keep_inner=True),
        *(one for one in sums.adapters[0] if one is not None), sums.d_bias, sums.dot,
        cpu.grad_input([BaseTerm(dy, W, gain)], lows), *cpu.grad_project(normal, lows),
        cpu.row_norm(normal, A, v, 0.3), cpu.row_norm(normal, A, v, 0.3, "in"),
    ]  # fmt: skip


def equal(some, others):
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_depends_on_the_number_of_threads(dtype, threads):
    given = tensors(DTYPES[dtype])
    threads(1)
    alone = outcome(**given)
    for count in (2, 3, 4, 64):
        threads(count)
        assert cpu.threads(M * R * R) == 1 < cpu.threads(M * K * R) == count
        assert equal(outcome(**given), alone)


def test_calls_from_several_threads_at_once(threads):
    threads(2)
    problems = [tensors(dtype) for dtype in (torch.float32, torch.bfloat16)] * 2
    wanted, found = [outcome(**given) for given in problems], {}
    together = threading.Barrier(len(problems))

    def work(i):
        together.wait()
        found[i] = [outcome(**problems[i]) for _ in range(2)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(equal(one, wanted[i]) for i in range(len(problems)) for one in found[i])


def _in_child(given, answer):
    # As torch's own DataLoader does: neither its products nor ours have their parent's threads
    # here, and wait for them forever.
    torch.set_num_threads(1)
    answer.put([one.float().sum().item() for one in outcome(**given)])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_process_forked_after_threads_ran(threads):
    given = tensors(torch.float32)
    threads(2)
    outcome(**given)
    # Sums of our results, by a number of threads that gives the same ones.
    threads(1)
    wanted = [one.float().sum().item() for one in outcome(**given)]
    threads(2)
    fork = multiprocessing.get_context("fork")
    answer = fork.Queue()
    child = fork.Process(target=_in_child, args=(given, answer), daemon=True)
    child.start()
    try:
        assert answer.get(timeout=60) == wanted
    finally:
        child.kill()
        child.join()
