"""What the loops of the streaming kernels do, counted in the machine code for sm_90 of 16-bit
operands: LOOPS in what Triton makes, FORMS in what nvcc makes of csrc/cuda. Both are written by
tools/modelled_steps.py. Imports no triton.
"""

from __future__ import annotations

from typing import NamedTuple


class Counts(NamedTuple):
    """What the machine code of one kernel's loop does.

    instructions, integer: for an element of the large operand, in one thread; integer: those of the
    pipe of integer logic. in_flight: bytes on their way to a multiprocessor; 0 for a kernel without
    a loop, whose loads all are.
    """

    instructions: float
    integer: float
    in_flight: int


class FormCounts(NamedTuple):
    """What the machine code of the loop of one form of a CUDA kernel does.

    instructions, integer: as in Counts. in_flight: bytes on their way to one block of threads.
    blocks: those that a multiprocessor holds.
    """

    instructions: float
    integer: float
    in_flight: int
    blocks: int

    def of(self, blocks: float) -> Counts:
        """Return the counts of a launch of so many blocks for each multiprocessor."""
        return Counts(
            self.instructions, self.integer, round(self.in_flight * min(self.blocks, blocks))
        )


# By the loop, as tests/helpers/reference_launches.py names it, and the block of ranks.
LOOPS: dict[tuple[str, int], Counts] = {
    ("project", 16): Counts(2.344, 0.8594, 115661),
    ("project", 64): Counts(4.938, 1.25, 69583),
    ("project", 128): Counts(6.125, 1.75, 114779),
    ("project", 256): Counts(20.75, 7.5, 85706),
    ("project, dropout", 16): Counts(11.08, 5.781, 99090),
    ("project, dropout", 64): Counts(16.75, 6.25, 65329),
    ("project, dropout", 128): Counts(16.81, 7.312, 101349),
    ("project, dropout", 256): Counts(57.5, 17, 77400),
    ("grad_output", 16): Counts(4.344, 1.594, 87696),
    ("grad_output", 64): Counts(5.344, 2.062, 77486),
    ("grad_output", 128): Counts(10.44, 3.875, 115589),
    ("grad_output", 256): Counts(15.5, 6.438, 104712),
    ("grad_output, bias", 16): Counts(7.031, 2.125, 93736),
    ("grad_output, bias", 64): Counts(9.188, 2.531, 74682),
    ("grad_output, bias", 128): Counts(14.12, 4.688, 116837),
    ("grad_output, bias", 256): Counts(20.06, 7.062, 104250),
    ("grad_output, kept", 16): Counts(12.62, 3.562, 56629),
    ("grad_output, kept", 64): Counts(16.31, 4.062, 39141),
    ("grad_output, kept", 128): Counts(24.62, 5.875, 55727),
    ("grad_output, kept", 256): Counts(31.62, 9, 53556),
    ("grad_project", 16): Counts(3.234, 1.297, 91871),
    ("grad_project", 64): Counts(5.188, 1.938, 76184),
    ("grad_project", 128): Counts(10, 3.5, 113794),
    ("grad_project", 256): Counts(28.25, 12.12, 94341),
    ("grad_project, dropout", 16): Counts(13.7, 7.016, 76018),
    ("grad_project, dropout", 64): Counts(15.97, 7.531, 68089),
    ("grad_project, dropout", 128): Counts(20.06, 10.31, 103640),
    ("grad_project, dropout", 256): Counts(55.62, 17, 163391),
    ("low_rank_add", 16): Counts(17.62, 8.062, 0),
    ("low_rank_add, accumulated", 16): Counts(24.75, 11.62, 0),
    ("drop", 16): Counts(16.5, 7.906, 0),
    ("drop, accumulated", 16): Counts(18.5, 7.781, 0),
    ("row_norm, rows", 16): Counts(9.094, 3.281, 49710),
    ("row_norm, rows", 64): Counts(14.56, 3.625, 69397),
    ("row_norm, rows", 128): Counts(28.62, 7.25, 67878),
    ("row_norm, rows", 256): Counts(58.75, 14.75, 86051),
    ("row_norm, columns", 16): Counts(7.906, 2.438, 25856),
    ("row_norm, columns", 64): Counts(14.19, 3.25, 35222),
    ("row_norm, columns", 128): Counts(29.88, 6.125, 63392),
    ("row_norm, columns", 256): Counts(67, 11.75, 39852),
}
# By stem and flags, as lorafast/engine/cuda_forms.py names them; of up to 16 ranks in bf16.
FORMS: dict[tuple[str, int], FormCounts] = {
    ("project", 6): FormCounts(1.891, 0.5469, 10680, 4),
    ("project", 7): FormCounts(7.828, 4.266, 15824, 3),
    ("project", 14): FormCounts(2.422, 0.75, 13543, 4),
    ("project", 15): FormCounts(8.062, 4.516, 18567, 3),
    ("decode", 0): FormCounts(1.922, 0.3281, 44357, 1),
    ("decode", 4): FormCounts(1.922, 0.4688, 43025, 1),
    ("grad_project", 2): FormCounts(2.125, 1.156, 9724, 4),
    ("grad_project", 3): FormCounts(8.625, 5.359, 14002, 3),
    ("grad_output", 7): FormCounts(4.734, 2.453, 30625, 1),
    ("grad_output", 15): FormCounts(5.219, 2.469, 29751, 1),
    ("grad_output", 31): FormCounts(6.922, 3.219, 31982, 1),
    ("grad_output", 6): FormCounts(1.906, 1.047, 9459, 4),
    ("low_rank_add", 2): FormCounts(3.016, 1.203, 647, 6),
    ("low_rank_add", 10): FormCounts(4.953, 1.531, 465, 4),
    ("low_rank_add", 6): FormCounts(4.781, 2.156, 10163, 4),
    ("low_rank_add", 14): FormCounts(6.984, 2.5, 11298, 3),
    ("low_rank_add", 3): FormCounts(9.375, 5.266, 1859, 4),
    ("low_rank_add", 7): FormCounts(10.16, 5.219, 11532, 3),
    ("low_rank_add", 34): FormCounts(4.641, 2.234, 1021, 6),
    ("low_rank_add", 42): FormCounts(6.516, 2.453, 830, 4),
    ("low_rank_add", 38): FormCounts(6.484, 3.266, 11592, 4),
    ("low_rank_add", 46): FormCounts(8.594, 3.438, 12307, 3),
    ("low_rank_add", 98): FormCounts(4.531, 2.188, 960, 6),
    ("low_rank_add", 102): FormCounts(6.391, 3.203, 11552, 4),
    ("low_rank_add", 99): FormCounts(10.84, 6.25, 2497, 4),
    ("low_rank_add", 103): FormCounts(11.66, 6.203, 12439, 3),
    ("row_norm", 3): FormCounts(3.578, 1.125, 33698, 1),
    ("row_norm", 7): FormCounts(5.375, 2.859, 32417, 1),
    ("row_norm", 2): FormCounts(5.391, 1.969, 32626, 1),
}
