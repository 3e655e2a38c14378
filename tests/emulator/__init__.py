"""Runs Triton kernels as compiled for sm_80 and sm_90, without a GPU.

Triton's PTX is executed in numpy on CPU tensors. Triton's own launcher stays in charge, so that
specialization, alignment hints, descriptors and grids are the real ones. nvcc's PTX, with static
shared memory, is launched by `helpers/cuda_launches.py`.

    with driver.emulating(90):
        kernel[grid](x, y, ...)

- `parser.py`: PTX as instructions, registers and basic blocks in an order in which threads that
  diverged meet again
- `translation.py`, `memory_translation.py`, `arithmetic.py`: a block as a Python function over
  arrays [threads]
- `machine.py`, `async_units.py`: threads, barriers, cp.async, mbarriers, TMA, wgmma
- `memory.py`: global memory (the host's, with bounds and alignment checked), and shared memory with
  what is needed to see races
- `tensor_cores.py`, `tma.py`: fragments, shared-memory descriptors, tensor maps and boxes
- `driver.py`: what stands in for CUDA; `process.py`: a process that may compile, beside pytest's,
  which interprets kernels

Arithmetic: bf16 and fp16 round to nearest even. Products of tensor cores are exact and their sums
are fp32 in the order of numpy's BLAS; operands in tf32 are truncated to 10 bits. fma.rn.f32 goes
through fp64. Subnormals are kept unless an instruction has .ftz; approximations are exact.

Faults (`memory.Fault`, with the instruction): global access outside the span of a tensor argument,
or misaligned; shared access out of bounds, misaligned, or of what nobody wrote; two warps that
touch the same shared bytes since the last barrier, one of them writing (two equal values are let
pass); reading what cp.async or TMA has not been waited for (copies land as late as they may);
writing what wgmma or a TMA store still reads; asynchronous reads without fence.proxy.async; a part
of a warp at an instruction for whole warps; deadlock; tensor maps that CUDA refuses. The
accumulators of wgmma are NaN until wgmma.wait_group.

Not seen: races in global memory between CTAs, races inside a warp, registers of wgmma's A that are
overwritten too early, anything about time. A fence.proxy.async counts for its whole CTA. Not
implemented: clusters, atomics, tcgen05, wgmma of tf32 or fp8, barriers of a part of a CTA.
"""
