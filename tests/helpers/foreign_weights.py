"""Weights that another library computes with, as quantised ones are."""

import torch
from torch import nn


class Codes(torch.Tensor):
    """A weight that another library computes with, as torchao's are."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"Codes dispatch: {function}")


def codes(weight):
    """Return a Parameter of foreign class with the shape and dtype of a weight."""
    wrapped = torch.Tensor._make_wrapper_subclass(Codes, weight.shape, dtype=weight.dtype)
    return nn.Parameter(wrapped, requires_grad=False)
