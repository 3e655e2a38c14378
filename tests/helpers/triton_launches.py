"""What the host path over the `triton` backend launches, as a test can compare it."""

import contextlib
import os
from unittest import mock

from helpers import host_on_triton
from lorafast import testing
from lorafast.engine import dispatch, plain_products


def launches(cuda, given):
    """What has been launched; of an address, what it lies in: a given tensor, or what was made."""
    spans = {
        name: (tensor.data_ptr(), tensor.data_ptr() + tensor.untyped_storage().nbytes())
        for name, tensor in given.items()
        if tensor is not None
    }

    def told(address):
        for name, (begin, end) in spans.items():
            if begin <= address < end:
                return name, address - begin
        return "made", address % 16

    found = []
    for function, sizes, values in cuda.launches():
        words = []
        for kind, value in zip(cuda.kinds[function], values, strict=True):
            # The stand-in for a tensor map has the address as its third word.
            at = {"*": 0, "nvTmaDesc": 16}.get(kind if kind == "nvTmaDesc" else kind[0])
            if at is not None:
                address = int.from_bytes(value[at : at + 8], "little")
                words.append((told(address), value[:at], value[at + 8 :]))
            else:
                words.append(value)
        found.append((function, sizes, words))
    return found


def step(case, tensors, cuda, function=testing.ours):
    """The launches of a step."""
    given = {}

    def ours(case, t):
        given.update(t)
        return function(case, t)

    cuda.noted()
    testing.run(ours, case, tensors)
    return launches(cuda, given)


@contextlib.contextmanager
def served(capability=90):
    """A context in which C++ launches by a driver that runs nothing: it gives CUDA and a Served."""
    with host_on_triton.on_gpu(capability) as cuda:
        address = host_on_triton.address_of(cuda.library.cuLaunchKernelEx)
        with host_on_triton.served_by_host(address) as calls:
            yield cuda, calls


@contextlib.contextmanager
def chosen(backends):
    """A context in which `auto` takes these backends of primitives, and eager for the others."""

    def refusing(backend):
        return lambda primitive, problem: () if backends.get(primitive) == backend else ("no",)

    with contextlib.ExitStack() as stubs:
        stubs.enter_context(mock.patch.dict(os.environ, {"LORAFAST_BACKEND": "auto"}))
        # No call is of so few tokens that torch's own products serve in Python.
        for most in ("MOST_ELEMENTS", "MOST_ELEMENTS_COPIED"):
            stubs.enter_context(mock.patch.object(plain_products, most, -1))
        for backend in ("cuda", "triton", "cpu"):
            module = dispatch.load(backend)
            stubs.enter_context(mock.patch.object(module, "why_not", refusing(backend)))
        stubs.callback(dispatch._routes.cache_clear)
        dispatch._routes.cache_clear()
        yield
