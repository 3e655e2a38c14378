"""bitsandbytes.nn.Linear4bit: NF4 and FP4 in blocks over the flattened weight.

    W[i] = code[q[i]] · absmax[i / blocksize]        absmax = code₂[a] · absmax₂[a / 256] + offset

The second equation is double quantisation. On a CPU with AVX512-BF16, bitsandbytes' inference
packs a weight anew, in place: groups of 32 rows, absmax [K/blocksize, N] in bf16. Unpacking, it
leaves absmax as it is where there is no double quantisation. All three are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorafast.engine.dequantise import dequantise_4bit, scale_blocks
from lorafast.quantised.weight import ON_META, QuantisedWeight, inherits, wrong_shape
from lorafast.runtime import env

# Rows that a group of the weight packed for CPUs holds: 16 in the low bits, then 16 in the high.
_GROUP = 32


class BitsAndBytes4Bit(QuantisedWeight):
    """The weight of a bitsandbytes Linear4bit.

    The bits are those of `bitsandbytes.functional.dequantize_4bit`. Not so on CPUs with AVX512
    where K is a multiple of 16 and not of the blocksize: there version 0.50.2 multiplies by the
    absmax of other blocks.
    """

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return True for a Linear4bit, quantised already or not."""
        return inherits(module, "bitsandbytes", "Linear4bit")

    @property
    def kind(self) -> str:
        """The code, and whether absmax is quantised too."""
        state = self._state()
        name = getattr(state or self.module.weight, "quant_type", "4-bit")
        double = state is not None and _is_nested(state)
        return f"bitsandbytes {name}, {'double' if double else 'single'} quantisation"

    def why_not(self) -> str | None:
        """Return why the weight cannot be read, or None."""
        weight, state = self.module.weight, self._state()
        if weight.is_meta:
            return ON_META
        if state is None:
            if weight.is_floating_point() and tuple(weight.shape) == self.shape:
                return "its weight is not quantised yet: move the layer to its device first"
            return "its quant_state is lost"
        return (
            self._why_not_packed(weight, state)
            or wrong_shape("code", state.code, (16,))
            or self._why_not_absmax(state)
        )

    def _why_not_packed(self, weight: torch.Tensor, state: Any) -> str | None:
        N, K = self.shape
        for name in ("shape", "dtype", "blocksize"):
            if not getattr(state, name, None):
                return f"its quant_state has no {name}"
        if tuple(state.shape) != (N, K):
            return f"its quant_state is of a weight {list(state.shape)}, the layer's is {[N, K]}"
        storage = getattr(self.module, "quant_storage", torch.uint8)
        if weight.dtype != storage and weight.dtype != torch.uint8:
            return f"its packed weight was cast from {storage} to {weight.dtype}, which destroys it"
        found, right = weight.numel() * weight.element_size(), (N * K + 1) // 2
        if found != right:
            return f"its packed weight has {found} bytes; {[N, K]} takes {right}"
        if _is_packed_for_cpu(state) and (N % _GROUP or K % 2):
            return f"its weight is packed for CPUs, which {[N, K]} cannot be"
        return None

    def _why_not_absmax(self, state: Any) -> str | None:
        N, K = self.shape
        transposed = (K // state.blocksize, N)
        if _is_packed_for_cpu(state) or getattr(state.absmax, "ndim", 1) == 2:
            return wrong_shape("absmax", state.absmax, transposed)
        blocks = -(-N * K // state.blocksize)
        if reason := wrong_shape("absmax", state.absmax, (blocks,)):
            return reason
        if (inner := getattr(state, "state2", None)) is None:
            return None
        if state.offset is None:
            return "the offset of its absmax is missing"
        return wrong_shape("nested code", inner.code, (256,)) or wrong_shape(
            "nested absmax", inner.absmax, (-(-blocks // inner.blocksize),)
        )

    @property
    def dtype(self) -> torch.dtype:
        """The layer's compute_dtype, or the dtype of the weight before it was quantised."""
        return self.module.compute_dtype or _dequantised_dtype(self._readable_state())

    def whole(self, out: torch.Tensor) -> torch.Tensor:
        """Write W into out and return it: on a GPU by bitsandbytes' kernel, in W's own dtype."""
        state = self._readable_state()
        rounds_once = _dequantised_dtype(state) in (torch.float32, out.dtype)
        if out.device.type == "cpu" and rounds_once and not _is_packed_for_cpu(state):
            return self._rows(state, 0, self.shape[0], out)
        served = out.device.type != "cpu" and out.dtype == state.dtype and state.absmax.dim() == 1
        if not served or env.is_forced("triton"):
            return super().whole(out)
        from bitsandbytes.functional import dequantize_4bit

        dequantize_4bit(self.module.weight.data, state, out=out)
        return out

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows start .. stop of W: rounded to the dtype it had before, then to this one."""
        state = self._readable_state()
        own = _dequantised_dtype(state)
        with torch.no_grad():
            if _is_packed_for_cpu(state):
                return self._rows_for_cpu(state, start, stop).to(own).to(dtype)
            # One rounding does where W's own dtype rounds nothing.
            out = torch.empty(
                (stop - start, self.shape[1]),
                dtype=dtype if own == torch.float32 else own,
                device=self.device,
            )
            return self._rows(state, start, stop, out).to(dtype)

    def _rows(self, state: Any, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Write rows into out, rounded once from fp32, from the blocks that hold them."""
        K, blocksize = self.shape[1], state.blocksize
        first, last = start * K // blocksize, -(-stop * K // blocksize)
        begin = first * blocksize
        packed = _bytes(self.module.weight)[begin // 2 : (stop * K + 1) // 2]
        absmax, code = _absmax(state, first, last), state.code.float()
        return dequantise_4bit(packed, absmax, code, blocksize, start * K - begin, out)

    def _rows_for_cpu(self, state: Any, start: int, stop: int) -> torch.Tensor:
        """Rows in fp32 of the weight packed for CPUs, from the whole groups that hold them."""
        K = self.shape[1]
        first = start // _GROUP * _GROUP
        last = -(-stop // _GROUP) * _GROUP
        packed = _bytes(self.module.weight)[first * K // 2 : last * K // 2]
        packed = packed.view(-1, K // 2, _GROUP // 2, 2)
        index = torch.stack([packed & 0xF, packed >> 4], dim=1).transpose(2, 3).reshape(-1, K)
        index = index[start - first : stop - first].reshape(-1)
        values = state.code.float().index_select(0, index.int())
        scale_blocks(values, state.absmax[:, start:stop].T.float().reshape(-1), state.blocksize)
        return values.view(stop - start, K)

    def why_not_requantised(self) -> str | None:
        """Return why the weight cannot be read, whose options it would take; None if it can."""
        return self.why_not()

    def _put(self, weight: torch.Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        before = self._state()
        narrow = weight.float() if weight.dtype == torch.float64 else weight
        packed, state = quantize_4bit(
            narrow.contiguous(),
            blocksize=before.blocksize,
            compress_statistics=_is_nested(before),
            quant_type=before.quant_type,
            quant_storage=getattr(self.module, "quant_storage", torch.uint8),
        )
        state.dtype = _dequantised_dtype(before)
        self.module.weight.data = packed
        self.module.weight.quant_state = self.module.quant_state = state

    def _state(self) -> Any:
        """The quant_state; FSDP loses the weight's, so the module keeps it too."""
        return getattr(self.module.weight, "quant_state", None) or self.module.quant_state

    def _readable_state(self) -> Any:
        """Return the quant_state. RuntimeError if it is lost, or not of the bytes that are there.

        A cast (`model.half()`) of bytes that are stored as floats leaves the state as it was.
        """
        state = self._state()
        if state is None or self._why_not_packed(self.module.weight, state):
            self.require_readable()
        return state


def _is_packed_for_cpu(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _is_nested(state: Any) -> bool:
    """True if the weight was quantised doubly; packed for CPUs, it is no longer."""
    return getattr(state, "original_nested", state.nested)


def _dequantised_dtype(state: Any) -> torch.dtype:
    return state.original_dtype if _is_packed_for_cpu(state) else state.dtype


def _bytes(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().view(-1).view(torch.uint8)


def _absmax(state: Any, first: int, last: int) -> torch.Tensor:
    """Return absmax of blocks first .. last in fp32."""
    if state.absmax.dim() == 2:
        return state.absmax.T.reshape(-1)[first:last].float()
    inner = getattr(state, "state2", None)
    if inner is None:
        return state.absmax[first:last].float()
    begin = first // inner.blocksize
    packed = state.absmax[begin * inner.blocksize : last]
    values = inner.code.float().index_select(0, packed.int())
    scale_blocks(values, inner.absmax[begin:].float(), inner.blocksize)
    return values[first - begin * inner.blocksize :].add_(state.offset)
