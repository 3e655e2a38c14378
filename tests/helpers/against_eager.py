"""The results of a primitive against those of the eager backend, by the error rule."""

import itertools

import torch

from helpers.triton_interpreter import within_twice
from lorafast.engine.backends import eager


def widened(operand):
    """Return an operand, a list or a tuple of them, in float64."""
    if isinstance(operand, torch.Tensor):
        return operand.double() if operand.is_floating_point() else operand
    if isinstance(operand, tuple) and hasattr(operand, "_fields"):
        return type(operand)(*map(widened, operand))
    return list(map(widened, operand)) if isinstance(operand, list) else operand


def tensors_in(result):
    """Return the tensors of a result, from left to right."""
    if isinstance(result, torch.Tensor):
        return [result]
    nested = result if isinstance(result, list | tuple) else []
    return list(itertools.chain.from_iterable(map(tensors_in, nested)))


def assert_as_exact_as_eager(found, primitive, dtype, *operands):
    """Assert that every tensor of a result errs at most twice as much as eager's."""
    stock = tensors_in(getattr(eager, primitive)(*operands))
    truth = tensors_in(getattr(eager, primitive)(*widened(list(operands))))
    results = tensors_in(found)
    assert len(results) == len(truth)
    for one, other, true in zip(results, stock, truth, strict=True):
        within_twice([one], [other], [true], dtype)
