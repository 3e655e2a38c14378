"""The launches that the Triton backend would make, noted on meta tensors instead of made.

The functions are those of lorafast.engine.backends.Backend, and follow backends/triton.py and the
wrappers in kernels/ launch for launch; tests/engine/test_step_model.py compares the two. What
these leave to torch is left to torch here, too. Imports no triton.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorafast.engine.backends import eager
from lorafast.engine.kernels import configs, gemm_routing, modelled
from lorafast.engine.kernels.gemm_routing import Route, RouteQuery
from lorafast.engine.kernels.modelled import Machine, Work
from lorafast.engine.precision import apply_core, low_rank_grad_dtype, scaled_to_fp16
from lorafast.engine.problem import (
    BaseTerm,
    DownProj,
    LowRankTerm,
    OutputGrads,
    Scaling,
    UpProj,
    UpProjGrads,
    UpProjGradSpec,
    tokens,
)
from lorafast.engine.row_blocks import flatten_tokens

_FP32 = torch.float32


class ModelledKernels:
    """The backend of one machine, for calls of one adapter in 16 bits.

    note: gets the work of every launch.
    """

    def __init__(self, note: Callable[[Work], None], machine: Machine) -> None:
        self._note, self._machine = note, machine
        self._arch = machine.arch

    def drop(self, x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
        out = x.new_empty(x.shape)
        self.drop_into(out, x, seed, p)
        return out

    def drop_into(
        self,
        out: torch.Tensor,
        x2: torch.Tensor,
        seed: torch.Tensor,
        p: float,
        first_row: int = 0,
        scaled: bool = True,
        accumulate: bool = False,
    ) -> None:
        """Note the launch of kernels.drop.drop."""
        loop = "drop, accumulated" if accumulate else "drop"
        self._stream("drop", loop, 0, x2, [x2, seed, out], out if accumulate else None)

    def project(
        self, x: torch.Tensor, downs: list[DownProj]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        x2 = flatten_tokens(x)
        return [self._project(x2, down, x.dtype) for down in downs]

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        ups: list[UpProj],
        gain: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        keep_inner: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x2, (N, K), weight = flatten_tokens(x), weight.shape, weight.to(x.dtype)
        M, R = x2.shape[0], sum(up.B.shape[1] for up in ups)
        query = self._query(M, N, [x2, weight], K, R, passes=int(gain is not None) + keep_inner)
        route = gemm_routing.pick(query)
        if not route.fused or not M * N * K:
            first = None if route.fused else route.form == "low first"
            return eager.linear(x, weight, ups, gain, bias, keep_inner, first)
        y = x.new_empty(*x.shape[:-1], N)
        z = x2.new_empty(M, N) if keep_inner else None
        summands = [(x2, weight)]
        for up in ups:
            summands.append(
                self._low_rank(up.h_core, up.B, query.by_row, route, up.scaling, up.out_scale)
            )
        self._gemm(y.view(M, N), summands, None, route, z)
        return y, z

    def grad_output(
        self,
        dy: torch.Tensor,
        specs: list[UpProjGradSpec],
        gain: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
        want_bias: bool = False,
    ) -> OutputGrads:
        (spec,), dy2 = specs, flatten_tokens(dy)
        (M, N), wanted = dy2.shape, 2 if kept is not None else int(want_bias)
        needs_u, needs_P = spec.want_v or spec.want_core, spec.want_B or spec.want_out_scale
        factor, inverse = self._grad_factor(spec, gain, dy.dtype) if needs_u else (None, None)
        skipped = 0 if spec.want_out_scale else spec.frozen_columns
        h_core = apply_core(spec.h, spec.core)[:, skipped:] if needs_P else None
        u_ranks = 0 if factor is None else factor.shape[1]
        P_ranks = 0 if h_core is None else h_core.shape[1]
        columns = bool(P_ranks or wanted)
        one_pass = needs_u and columns and configs.one_pass(u_ranks, P_ranks)
        ranks = max(1, P_ranks, one_pass * u_ranks)
        split = configs.grad_output(M, N, ranks, dy.dtype, self._arch, wanted)
        blocks, splits = configs.ceil_div(N, split.tile.BLOCK_N), split.splits
        u = dy2.new_empty(blocks, M, u_ranks, dtype=_FP32) if one_pass else None
        P = dy2.new_empty(splits, N, P_ranks, dtype=_FP32) if P_ranks else None
        sums = dy2.new_empty(splits, wanted, N, dtype=_FP32) if wanted else None
        if columns and N:
            h_core = h_core if h_core is None else h_core.contiguous()
            B = factor.contiguous() if one_pass else None
            kept2 = None if kept is None else flatten_tokens(kept)
            loop = "grad_output" + ("", ", bias", ", kept")[wanted]
            self._stream("grad_output", loop, ranks, dy2, [dy2, kept2, h_core, B, u, P, sums])
        grads = self._adapter_grads(dy2, spec, gain, factor, inverse, u, P)
        total = None if sums is None else sums.sum(0)
        d_bias = total[0] if want_bias else None
        return OutputGrads([grads], d_bias, None if kept is None else total[1])

    def grad_input(self, bases: list[BaseTerm], low_ranks: list[LowRankTerm]) -> torch.Tensor:
        dy, K = bases[0].dy, bases[0].weight.shape[1]
        low_ranks = [term._replace(v=term.v.to(dy.dtype)) for term in low_ranks]
        M, R = tokens(dy), sum(term.A.shape[0] for term in low_ranks)
        plain = [term for term in low_ranks if not term.p]
        dropped = [term for term in low_ranks if term.p]
        dx = dy.new_empty(*dy.shape[:-1], K)
        dx2 = dx.view(M, K)
        ((dy2, weight),) = map(eager.gained_operands, bases)
        query = self._query(
            M, K, [dy2, weight], dy2.shape[1], R, len(dropped), by_row=weight.stride(0) == 1
        )
        route = gemm_routing.pick(query)
        if route.fused and M * K * dy2.shape[1]:
            own, masked = (
                [self._low_rank(v, A.t(), query.by_row, route) for v, A, *_ in terms]
                for terms in (plain, dropped)
            )
            self._gemm(dx2, [(dy2, weight.t()), *own], masked[0] if masked else None, route)
            return dx
        low_first = route.form == "low first"
        factors = [(v, A.to(dy.dtype)) for v, A, *_ in plain] + [(dy2, weight)]
        if low_first:
            self._low_rank_add(dx2, dropped, False)
        eager.add_products(dx2, factors, low_first and bool(dropped), low_first)
        if not low_first:
            self._low_rank_add(dx2, dropped, True)
        return dx

    def grad_project(self, x: torch.Tensor, low_ranks: list[LowRankTerm]) -> list[torch.Tensor]:
        x2 = flatten_tokens(x)
        return [self._sum_over_rows(x2, v, seed, p) for v, _, seed, p, _ in low_ranks]

    def row_norm(
        self,
        weight: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        scaling: Scaling = 1.0,
        axis: str = "out",
    ) -> torch.Tensor:
        (N, K), R, by_row = weight.shape, A.shape[0], axis == "out"
        splits = configs.row_norm(N, K, R, weight.dtype, self._arch, by_row).splits
        squares = weight.new_empty(splits, N if by_row else K, dtype=_FP32)
        if configs.BLOCKS_R[0] < R and self._arch.vendor != "amd":
            if by_row:
                A = self._scale_cast(A, _FP32, tf32=True)
            else:
                B, scaling = self._scale_cast(B, _FP32, scaling, tf32=True), 1.0
        scale = scaling if isinstance(scaling, torch.Tensor) else None
        loop = f"row_norm, {'rows' if by_row else 'columns'}"
        self._stream("row_norm", loop, R, weight, [weight, A, B, scale, squares])
        return squares.sum(0).sqrt_()

    def _adapter_grads(self, dy2, spec, gain, factor, inverse, u, P) -> UpProjGrads:
        """u: its parts, or None where it takes a pass of its own."""
        own_u = v = dB = d_out_scale = d_core = None
        if factor is not None:
            core, dtype = (
                None if spec.core is None else spec.core.t(),
                low_rank_grad_dtype(dy2.dtype),
            )
            if u is None:
                own_u, v = self._project(dy2, DownProj(factor.t(), core), dtype)
            else:
                own_u, v = self._finish(u, factor.shape[1], core, dtype)
            if inverse is not None:
                own_u, v = own_u * inverse, v * inverse
        if spec.want_B or spec.want_out_scale:
            N, R = spec.B.shape
            dB = dy2.new_empty(N, R, dtype=_FP32) if spec.want_B else None
            d_out_scale = dy2.new_empty(N, dtype=_FP32) if spec.want_out_scale else None
            if P is None:
                dB.zero_()
            else:
                scale = spec.scaling if isinstance(spec.scaling, torch.Tensor) else None
                tensors = [P, gain, spec.out_scale, spec.B, scale, dB, d_out_scale]
                self._small("grad_output_finish", tensors)
        if spec.want_core and spec.core.dim() == 1:
            d_core = (own_u.float() * spec.h).sum(0)
        elif spec.want_core:
            d_core = self._sum_over_rows(spec.h, own_u)
        return UpProjGrads(v if spec.want_v else None, dB, d_core, d_out_scale)

    def _grad_factor(self, spec, gain, dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        row_scale = gain if spec.out_scale is None else spec.out_scale
        if gain is not None and spec.out_scale is not None:
            row_scale = gain * spec.out_scale
        wide = low_rank_grad_dtype(dtype)
        factor = self._scale_cast(spec.B, wide, spec.scaling, row_scale)
        return (factor, None) if wide == dtype else scaled_to_fp16(factor)

    def _project(
        self, x2: torch.Tensor, down: DownProj, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (M, K), (R, _), A = x2.shape, down.A.shape, down.A
        split = configs.project(M, K, R, x2.dtype, self._arch)
        in_registers = down.core is not None and configs.core_in_registers(R, dtype)
        if in_parts := split.splits > 1 or in_registers:
            h = x2.new_empty(split.splits, M, R, dtype=_FP32)
        else:
            h = x2.new_empty(M, R, dtype=dtype)
        if configs.casts_first(split.tile, M, K, R, self._arch):
            A = self._scale_cast(A, x2.dtype)
        loop = "project, dropout" if down.p else "project"
        self._stream("project", loop, R, x2, [x2, A, down.seed, h])
        return self._finish(h, R, down.core, dtype) if in_parts else (h, apply_core(h, down.core))

    def _finish(
        self, parts: torch.Tensor, R: int, core: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h = parts.new_empty(parts.shape[1], R, dtype=dtype)
        in_registers = core is not None and configs.core_in_registers(R, dtype)
        h_core = torch.empty_like(h) if in_registers else h
        self._small("project_finish", [parts, core if in_registers else None, h, h_core])
        return h, h_core if in_registers else apply_core(h, core)

    def _sum_over_rows(
        self,
        x2: torch.Tensor,
        v: torch.Tensor,
        seed: torch.Tensor | None = None,
        p: float = 0.0,
    ) -> torch.Tensor:
        inverse = None
        if v.dtype != x2.dtype and x2.dtype == torch.float16:
            v, inverse = scaled_to_fp16(v)
        (M, K), R = x2.shape, v.shape[1]
        splits = configs.grad_project(M, K, R, x2.dtype, self._arch).splits
        out = x2.new_empty(splits, R, K, dtype=_FP32)
        loop = "grad_project, dropout" if p else "grad_project"
        self._stream("grad_project", loop, R, x2, [x2, v, seed, out])
        total = out[0] if splits == 1 else out.sum(0)
        return total if inverse is None else total.mul_(inverse)

    def _low_rank_add(self, out: torch.Tensor, terms: list[LowRankTerm], accumulate: bool) -> None:
        for v, A, seed, *_ in terms:
            loop, again = "low_rank_add", None
            if accumulate:
                loop, again = "low_rank_add, accumulated", out
            self._stream("low_rank_add", loop, 0, out, [v, A, seed, out], again)
            accumulate = True

    def _scale_cast(
        self,
        F: torch.Tensor,
        dtype: torch.dtype,
        scaling: Scaling = 1.0,
        row_scale: torch.Tensor | None = None,
        by_row: bool = True,
        multiple: int = 1,
        tf32: bool = False,
    ) -> torch.Tensor:
        I, J = F.shape  # noqa: E741
        width = configs.ceil_div(J, multiple) * multiple
        scale = scaling if isinstance(scaling, torch.Tensor) else None
        unscaled = row_scale is None and scale is None and scaling == 1
        is_dense = F.stride(1 if by_row else 0) == 1 or F.shape[1 if by_row else 0] == 1
        if unscaled and not tf32 and F.dtype == dtype and width == J and is_dense:
            return F
        out = (
            F.new_empty(I, width, dtype=dtype) if by_row else F.new_empty(width, I, dtype=dtype).t()
        )
        if out.numel():
            self._small("scale_cast", [F, row_scale, scale, out])
        return out

    def _low_rank(
        self,
        a: torch.Tensor,
        factor: torch.Tensor,
        by_row: bool,
        route: Route,
        scaling: Scaling = 1.0,
        row_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The operands of a fused low-rank summand."""
        multiple = 8 if route.form == "tma" else 16
        b = self._scale_cast(factor, a.dtype, scaling, row_scale, by_row, multiple)
        if a.shape[1] % multiple:
            a = torch.nn.functional.pad(a, (0, -a.shape[1] % multiple))
        return a, b

    def _query(
        self,
        M: int,
        N: int,
        operands: list[torch.Tensor],
        K: int,
        R: int,
        dropped: int = 0,
        passes: int = 0,
        by_row: bool | None = None,
    ) -> RouteQuery:
        a, b = operands
        aligned = not any(size * a.itemsize % 16 for size in (N, K))
        by_row = b.stride(1) == 1 if by_row is None else by_row
        return RouteQuery(
            M, N, (K,), R, a.dtype, self._arch, by_row, dropped > 0, False, passes, aligned,
            dropped <= 1, self._machine.routing,
        )  # fmt: skip

    def _gemm(
        self,
        out: torch.Tensor,
        summands: list[tuple[torch.Tensor, torch.Tensor]],
        masked: tuple[torch.Tensor, torch.Tensor] | None,
        route: Route,
        inner: torch.Tensor | None = None,
    ) -> None:
        pairs = [*summands, *([masked] if masked else [])]
        tensors = [out, *(t for pair in pairs for t in pair)]
        moved, depths = sum(map(modelled.bytes_of, tensors)), [a.shape[1] for a, _ in pairs]
        if inner is not None:
            moved += modelled.bytes_of(inner)
        specs = self._machine.specs
        work = modelled.gemm(route.form, out.numel(), depths, moved, masked is not None, specs)
        self._note(work)
        if route.splits > 1:
            # Every part is written in fp32, and read again by a second kernel.
            self._note(modelled.small("gemm_finish", 8 * route.splits * out.numel(), specs))

    def _stream(
        self,
        kernel: str,
        loop: str,
        R: int,
        large: torch.Tensor,
        tensors: list[torch.Tensor | None],
        again: torch.Tensor | None = None,
    ) -> None:
        """again: a tensor that is read before it is written."""
        moved = _bytes(tensors) + (0 if again is None else modelled.bytes_of(again))
        self._note(modelled.stream(kernel, loop, R, large.numel(), moved, self._machine.specs))

    def _small(self, kernel: str, tensors: list[torch.Tensor | None]) -> None:
        self._note(modelled.small(kernel, _bytes(tensors), self._machine.specs))


def _bytes(tensors: list[torch.Tensor | None]) -> int:
    """The bytes of tensors; one that is named twice counts once."""
    distinct = {id(tensor): tensor for tensor in tensors if tensor is not None}
    return sum(map(modelled.bytes_of, distinct.values()))
