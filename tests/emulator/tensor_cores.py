"""Tensor cores: fragments of mma.sync, ldmatrix, stmatrix and wgmma as matrices.

Products of bf16, fp16 and tf32 operands are exact in fp32. Sums run in fp32 in the order of numpy's
BLAS, and are rounded at every step. Hardware keeps a few bits more inside one instruction, and
truncates, so the last bit of a sum may differ from a GPU's. Operands in tf32 are truncated to 10
bits, as hardware reads them.
"""

from __future__ import annotations

import functools

import numpy as np

from emulator.arithmetic import widened

u2, u4, f4 = np.uint16, np.uint32, np.float32


@functools.cache
def _places(kind: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where a[16,k] and b[k,8] lie among a warp's [registers, lanes, halves], flat."""
    per = 1 if kind == "tf32" else 2
    a, b = np.empty((16, k), int), np.empty((k, 8), int)
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        for half in range(per):
            for reg in range(16 * k // 32 // per):
                row, col = g + 8 * (reg & 1), per * t + half + 4 * per * (reg >> 1)
                a[row, col] = (reg * 32 + lane) * per + half
            for reg in range(k * 8 // 32 // per):
                b[per * t + half + 4 * per * reg, g] = (reg * 32 + lane) * per + half
    return a.ravel(), b.ravel()


def _fragment(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """Return [warps, registers·32·halves] as fp32."""
    stacked = np.stack([register.reshape(-1, 32) for register in registers], axis=1)
    if kind == "tf32":
        return (stacked & u4(0xFFFFE000)).view(f4).reshape(len(stacked), -1)
    return widened(stacked.view(u2), kind).reshape(len(stacked), -1)


def mma(
    kind: str, k: int, a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]
) -> list[np.ndarray]:
    """Return mma.sync.m16n8k: d = a b + c for every warp. Registers are uint32 [threads]."""
    at_a, at_b = _places(kind, k)
    left = _fragment(a, kind)[:, at_a].reshape(-1, 16, k)
    right = _fragment(b, kind)[:, at_b].reshape(-1, k, 8)
    # [warps, 16, 8]; element (g + 8h, 2t + i) is register 2h + i of lane 4g + t.
    product = np.matmul(left, right)
    parts = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
    return [(parts[i] + c[i].view(f4)).view(u4) for i in range(4)]


def from_rows(rows: np.ndarray, count: int, trans: bool) -> list[np.ndarray]:
    """Return the registers of ldmatrix from uint16 [warps, 8·count, 8]."""
    matrices = rows.reshape(-1, count, 8, 8)
    if trans:
        matrices = matrices.transpose(0, 1, 3, 2)
    # [warps, count, 8, 4]: lane 4·row + pair.
    packed = np.ascontiguousarray(matrices).view(u4)
    return [np.ascontiguousarray(packed[:, i]).reshape(-1) for i in range(count)]


def to_rows(registers: list[np.ndarray], trans: bool) -> np.ndarray:
    """Return the uint16 [warps, 8·count, 8] that stmatrix writes."""
    stacked = np.stack([register.reshape(-1, 8, 4) for register in registers], axis=1)
    matrices = stacked.view(u2)
    if trans:
        matrices = matrices.transpose(0, 1, 3, 2)
    return np.ascontiguousarray(matrices).reshape(len(matrices), -1, 8)


class Operand:
    """A shared-memory descriptor of wgmma: start address, both byte offsets, swizzle."""

    def __init__(self, bits: int):
        self.start, self.leading, self.stride = ((bits >> n & 0x3FFF) << 4 for n in (0, 16, 32))
        self.mode = bits >> 62 & 3

    def chunks(self, rows: int, k: int, transposed: bool) -> np.ndarray:
        """Return the addresses of chunks of 16 bytes.

        [rows, k/8] where k is dense, [k, rows/8] where rows are (transposed).
        """
        # The chunks side by side within a swizzle's span.
        width = {0: 1, 1: 8, 2: 4, 3: 2}[self.mode]
        across, along = (k, rows // 8) if transposed else (rows, k // 8)
        line, chunk = np.arange(across)[:, None], np.arange(along)[None, :]
        offset = (line % 8) * 16 * width
        if not transposed:
            apart = self.leading if self.mode == 0 else 16
            offset = offset + line // 8 * self.stride + chunk * apart
        elif self.mode == 0:
            offset = offset + line // 8 * self.leading + chunk * self.stride
        else:
            offset = offset + line // 8 * self.stride
            offset = offset + chunk % width * 16 + chunk // width * self.leading
        return swizzled(self.start + offset, self.mode)


def swizzled(address: np.ndarray, mode: int) -> np.ndarray:
    """Return shared addresses in a swizzle of 128, 64 or 32 bytes (wgmma's modes 1, 2, 3)."""
    bits = {0: 0, 1: 7, 2: 3, 3: 1}[mode]
    return address ^ ((address >> 7 & bits) << 4)


def wgmma_a(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """Return fp32 [64,16] from the registers of one warpgroup, uint32 [128] each."""
    at, _ = _places(kind, 16)
    return _fragment(registers, kind)[:, at].reshape(64, 16)


def wgmma_sum(registers: np.ndarray) -> np.ndarray:
    """Return the accumulators of one warpgroup, uint32 [N/2, 128], as fp32 [64, N]."""
    count = len(registers)
    # Block, half, i, warp, g, t.
    parts = registers.view(f4).reshape(count // 4, 2, 2, 4, 8, 4)
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(64, 2 * count)


def wgmma_spread(matrix: np.ndarray) -> np.ndarray:
    """Return fp32 [64, N] as accumulators uint32 [N/2, 128]."""
    # Warp, half, g, block, t, i.
    parts = matrix.reshape(4, 2, 8, -1, 4, 2)
    return np.ascontiguousarray(parts.transpose(3, 1, 5, 0, 2, 4)).reshape(-1, 128).view(u4)
