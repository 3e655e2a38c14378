"""The functions that translated code calls: rounding, halves, division, permutations, conversions.

Values are numpy arrays [threads]; patterns are unsigned integers.
"""

from __future__ import annotations

import numpy as np

NUMBERS = {
    name: np.dtype(name).type
    for name in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8")
}


def widened(patterns: np.ndarray, kind: str) -> np.ndarray:
    """Return 16-bit patterns as fp32."""
    if kind == "f16":
        return patterns.view("f2").astype("f4")
    return (patterns.astype("u4") << np.uint32(16)).view("f4")


def rounded(value: np.ndarray, kind: str) -> np.ndarray:
    """Return fp32 rounded to the nearest even half, as 16-bit patterns."""
    value = np.asarray(value)
    if kind == "f16":
        return value.astype("f2").view("u2")
    bits = value.view("u4")
    near = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), near).astype("u2")


def half_math(op: str, kind: str, *values: np.ndarray) -> np.ndarray:
    """Return arithmetic on one or two halves, computed in fp64 and rounded once."""
    short, pair = kind.removesuffix("x2"), kind.endswith("x2")
    values = [np.atleast_1d(value) for value in values]
    wide = [widened(v.view("u2") if pair else v, short).astype("f8") for v in values]
    result = _HALF_MATH[op](*wide)
    halves = rounded(result.astype("f4"), short)
    return halves.view("u4") if pair else halves


_HALF_MATH = {
    "fma": lambda a, b, c: a * b + c,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
}


def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a/b, of integers rounded towards zero."""
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, b.dtype.type(1), b)
    down = a // safe
    if a.dtype.kind == "u":
        return down
    return down + ((down < 0) & (down * safe != a)).astype(a.dtype)


def permuted(a: np.ndarray, b: np.ndarray, control: np.ndarray) -> np.ndarray:
    """Return the bytes that prmt selects in its default mode."""
    both, result = a.astype("u8") | b.astype("u8") << np.uint64(32), np.zeros(a.shape, "u8")
    for i in range(4):
        which = (control >> np.uint32(4 * i)).astype("u8")
        byte = both >> ((which & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = (byte >> np.uint64(7)) * np.uint64(255)
        byte = np.where(which & np.uint64(8), sign, byte)
        result |= byte << np.uint64(8 * i)
    return result.astype("u4")


def looked_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Return lop3: bit by bit what the table says of three bits."""
    result = np.zeros(np.broadcast(a, b, c).shape, "u4")
    for i in range(8):
        if table >> i & 1:
            x, y, z = (v if i >> k & 1 else ~v for v, k in ((a, 2), (b, 1), (c, 0)))
            result |= x & y & z
    return result


def flushed(value: np.ndarray) -> np.ndarray:
    """Return fp32 with subnormal numbers as zeros."""
    return np.where(np.abs(value) < np.finfo("f4").tiny, value * 0, value).astype("f4")


def tf32_nearest(value: np.ndarray) -> np.ndarray:
    """Return cvt.rna.tf32: rounded to 10 bits, halves away from zero."""
    return (value.view("u4") + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def whole(value: np.ndarray, mode: str, kind: type) -> np.ndarray:
    """Return floats as integers of a kind, saturated."""
    direction = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode]
    limits = np.iinfo(kind)
    return np.clip(np.nan_to_num(direction(value.astype("f8"))), limits.min, limits.max).astype(
        kind
    )


NAMES = NUMBERS | {
    function.__name__: function
    for function in (
        widened, rounded, half_math, divided, permuted, looked_up, flushed, tf32_nearest, whole,
    )
}  # fmt: skip
