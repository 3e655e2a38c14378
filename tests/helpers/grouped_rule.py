"""The Triton backend's grouped primitives against those of the eager backend, by the error rule."""

import collections

import torch

from helpers.against_eager import tensors_in, widened
from helpers.triton_interpreter import within_twice
from lorafast.engine.grouped import eager, triton
from lorafast.engine.grouped.groups import Groups
from lorafast.engine.problem import OutputGrads


def groups_of(counts, sorted_again=True):
    """Return the groups of so many rows; their masks are those of other rows if sorted_again."""
    offsets = torch.tensor((0, *counts)).cumsum(0).to(torch.int32)
    places = torch.randperm(sum(counts)) * 5 + 2**32 if sorted_again else None
    return Groups(offsets, places)


def _rounded(result, dtype):
    """Return a result with its v in the activation's dtype, in which stock ops compute it.

    Beside fp16 eager's v is fp32.
    """
    if not isinstance(result, OutputGrads):
        return result
    adapters = [
        grads if grads.v is None else grads._replace(v=grads.v.to(dtype))
        for grads in result.adapters
    ]
    return result._replace(adapters=adapters)


class Errors:
    """The results of primitives over several draws: ours, eager's, and those in float64."""

    def __init__(self, dtype):
        self._dtype = dtype
        self._results = collections.defaultdict(lambda: ([], [], []))

    def add(self, label, primitive, groups, *operands):
        """Add the results of one draw to those of the same label."""
        found = getattr(triton, primitive)(groups, *operands)
        self.add_found(label, found, primitive, groups, *operands)

    def add_found(self, label, found, primitive, groups, *operands):
        """Add what a primitive has returned."""
        stock = _rounded(getattr(eager, primitive)(groups, *operands), self._dtype)
        truth = getattr(eager, primitive)(groups, *widened(list(operands)))
        results = zip(*map(tensors_in, (found, stock, truth)), strict=True)
        for i, of_each in enumerate(results):
            for values, value in zip(self._results[label, i], of_each, strict=True):
                values.append(value)

    def check(self):
        """Assert that every tensor of a result errs at most twice as much as eager's."""
        assert self._results
        for values in self._results.values():
            within_twice(*values, self._dtype)
