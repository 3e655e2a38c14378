"""Gates on the machine code of the kernels as 8192 tokens through 4096 → 4096 in bf16 launch them.

Instructions are counted, and nothing is timed. The limits are those of an H200 (132 multiprocessors
at 1.755 GHz, 4.3 TB/s): in the time in which memory delivers an element of bf16, a multiprocessor
issues 13.8 instructions of a thread, 6.9 of them on the pipe of integer logic; and at a latency of
0.65 µs, 24 KB have to be on their way to it.
"""

import functools
import itertools

import pytest
from emulator.process import in_emulator
from helpers import sass_loops
from helpers.reference_launches import CALLS, WITHOUT_LOOP, figures_of

from lorafast.engine.kernels import gemm_routing

MOST_INSTRUCTIONS, MOST_ALU, LEAST_IN_FLIGHT = 13.8, 6.9, 24 * 1024
RANKS = (16, 64, 128, 256)
# How often memory moves an element of the large operand, where it is not once.
PASSES = {"low_rank_add, accumulated": 2, "drop": 2, "drop, accumulated": 3}
LOW_RANK_ADD = ("low_rank_add", "low_rank_add, accumulated")


def unmended(calls, reason, ranks=(16,)):
    """Return a reason for each of some calls and ranks."""
    return {(call, R): f"{CALLS[call][0]}: {reason}" for call in calls for R in ranks}


# What does not hold yet, by gate, call and R.
UNMENDED = {
    "instructions": unmended(["low_rank_add"], "the mask takes too many"),
    "alu": unmended(["grad_project, dropout", "low_rank_add"], "the mask takes too many"),
    "serialized": unmended(["grad_project, dropout"], "x is masked in registers", (64,))
    | unmended(["project, dropout"], "x is masked in registers", (64, 128)),
}


def each_call(gate, ranks=(16,)):
    """Parametrize a test over calls and ranks; one of them is not slow."""
    parameters = []
    for call, R in itertools.product(CALLS, ranks):
        marks = [] if (call, R) == ("project", 16) else [pytest.mark.slow]
        if reason := UNMENDED.get(gate, {}).get((call, R)):
            marks.append(pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason))
        parameters.append(pytest.param(call, R, marks=marks))
    return pytest.mark.parametrize(("call", "R"), parameters)


@functools.cache
def figures(call, R, capability=90):
    """Return the figures of the kernel that a call is about; skip without the tools."""
    if missing := sass_loops.missing_tools(capability):
        pytest.skip(f"Triton's wheel here has no {' and no '.join(missing)}")
    return figures_of(call, R, capability)


@each_call("instructions")
@in_emulator
def test_instructions_of_an_element_are_issued_while_memory_delivers_it(call, R):
    assert figures(call, R).instructions <= MOST_INSTRUCTIONS * PASSES.get(call, 1), figures(
        call, R
    )


@each_call("alu")
@in_emulator
def test_integer_logic_of_an_element_is_done_while_memory_delivers_it(call, R):
    assert figures(call, R).alu <= MOST_ALU * PASSES.get(call, 1), figures(call, R)


@each_call("in_flight")
@in_emulator
def test_enough_bytes_are_on_their_way(call, R):
    if CALLS[call][0] in WITHOUT_LOOP:
        pytest.skip("all loads of a program are on their way at once")
    assert figures(call, R).bytes_in_flight >= LEAST_IN_FLIGHT, figures(call, R)


@each_call("late_loads")
@in_emulator
def test_no_load_is_first_used_in_the_step_that_begins_it(call, R):
    assert not figures(call, R).late_loads, figures(call, R)


@each_call("buffers", RANKS)
@in_emulator
def test_copies_overlap_with_the_step_before(call, R):
    assert not figures(call, R).single_buffered, figures(call, R)


@each_call("serialized", RANKS)
@in_emulator
def test_products_are_not_serialized(call, R):
    assert not figures(call, R).serialized, figures(call, R)


@each_call("spills", RANKS)
@in_emulator
def test_nothing_spills(call, R):
    assert figures(call, R).spills == 0, figures(call, R)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "form"), list(zip(LOW_RANK_ADD, ("low first", "base first"), strict=True))
)
@in_emulator
def test_the_roofline_knows_the_logic_of_the_mask_as_compiled(call, form):
    assert gemm_routing.MASK[form] == pytest.approx(figures(call, 16).alu, rel=0.1)


DUMP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR6][R2.64] ;
        /*0020*/                   LDGDEPBAR ;
        /*0030*/                   DEPBAR.LE SB0, 0x1 ;
        /*0040*/              @!P0 LDG.E.128.CONSTANT R24, desc[UR6][R4.64] ;
        /*0050*/                   LDG.E R30, desc[UR6][R6.64] ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/                   LOP3.LUT R8, R31, 0x7, R9, 0xc0, !PT ;
        /*0080*/                   FADD R10, R10, R30 ;
        /*0090*/               @P1 LDGSTS.E.BYPASS.128 [R9+0x100], desc[UR6][R2.64] ;
        /*00a0*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*00b0*/                   IMAD.MOV.U32 R27, RZ, RZ, R8 ;
        /*00c0*/               @P0 BRA 0x30 ;
        /*00d0*/                   BRA 0xd0 ;
"""


def test_a_loop_is_read_from_a_dump():
    code = sass_loops.instructions(DUMP)
    assert len(code) == 14
    (loop,) = [one for one in sass_loops.loops(code) if len(one) > 1]
    assert (loop[0].address, loop[-1].address) == (0x30, 0xC0)
    assert sass_loops.pipes(loop) == {
        "control": 3, "memory": 3, "alu": 1, "float": 1, "uniform": 1, "multiply": 1,
    }  # fmt: skip
    # One group may be on its way at the wait; the copies of the next begin at 6 of 10.
    assert sass_loops.copies(loop) == (16, 1, 0.6)
    wide, narrow = sass_loops.loads(loop)
    # R24 to R27 are overwritten, not read; R30 is read three instructions later.
    assert (wide.bytes, wide.carried) == (16, True)
    assert (narrow.bytes, narrow.ahead, narrow.carried) == (4, 0.3, False)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [(66, 70 * 1024, 4, 3), (177, 40000, 8, 1), (32, 1024, 4, 16), (255, 0, 16, 0)],
)
def test_blocks_of_a_multiprocessor(registers, shared, warps, blocks):
    assert sass_loops.blocks_per_multiprocessor(90, registers, shared, warps) == blocks
