"""The modelled time of what the cuda backend launches, noted on meta tensors instead of made.

The backend's own functions run: engine.cuda_forms gives their launches to a model in whose context
they run. Imports no triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lorafast.engine.cuda_forms import Form
from lorafast.engine.kernels import modelled
from lorafast.engine.kernels.gpu_specs import Device
from lorafast.engine.kernels.loop_counts import FORMS
from lorafast.engine.kernels.modelled import Work

# The kernels that pass over a large operand: its place among the arguments, that of the first
# tensor that is written, and the flag by which that is read, too.
_LARGE = {
    "project": (0, 3, 0), "grad_project": (0, 3, 0), "grad_output": (0, 7, 0),
    "low_rank_add": (7, 7, 4), "row_norm": (0, 4, 0), "decode": (0, 9, 0),
}  # fmt: skip
_SMALL = ("project_finish", "grad_output_finish", "sum_parts", "scale", "quotient", "decode_finish")
# project's form that leaves its sums to project_finish; the other has the same loop.
_PARTS = 4
# The most tiles of eight ranks of a form whose loop is counted, and its dtypes.
_TILES, _DTYPES = 2, (torch.bfloat16, torch.float16)


class ModelledForms:
    """The launches of CUDA kernels on one GPU.

    note: gets the work of every launch.
    """

    def __init__(self, note: Callable[[Work], None], specs: Device) -> None:
        self._note, self._specs = note, specs

    def launch(self, form: Form, grid: tuple[int, ...], *arguments: object) -> None:
        """Note a launch. ValueError for one whose loop is not counted."""
        moved = _bytes(arguments)
        if form.stem in _SMALL:
            self._note(modelled.small(form.stem, moved, self._specs))
            return
        if form.stem not in _LARGE:
            raise _uncounted(form)
        place, written, again = _LARGE[form.stem]
        flags = form.flags | _PARTS if form.stem == "project" else form.flags
        counts = FORMS.get((form.stem, flags))
        if counts is None or form.tiles > _TILES or form.dtype not in _DTYPES:
            raise _uncounted(form)
        large, read = arguments[place], _bytes(arguments[:written])
        assert isinstance(large, torch.Tensor)
        if flags & again:
            read += modelled.bytes_of(large)
            moved += modelled.bytes_of(large)
        loop = counts.of(math.prod(grid) / self._specs.multiprocessors)
        work = modelled.loop_of(form.stem, loop, large.numel(), moved, read, self._specs)
        self._note(work)


def _uncounted(form: Form) -> ValueError:
    return ValueError(f"{form} has no counted loop in kernels/loop_counts.py")


def _bytes(arguments: tuple[object, ...]) -> int:
    """The bytes of the tensors in arguments; one that is named twice counts once."""
    distinct = {id(one): one for one in arguments if isinstance(one, torch.Tensor)}
    return sum(map(modelled.bytes_of, distinct.values()))
