"""Compiles Triton kernels ahead of time, without a GPU.

`compile_ahead.py DTYPE TARGET KERNEL...` prints one JSON line a form: its tile and flags,
registers, stack, shared memory, and counts of instructions in its machine code. TARGET is the
capability of an NVIDIA GPU, such as 90, or the name of an AMD architecture, such as gfx942. With
`--first` before them it compiles only the first form of each kernel. It runs in a process of its
own, because pytest's process interprets kernels and then cannot compile them.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorafast.engine.kernels import (
    configs,
    dequantise,
    drop,
    expert_blocks,
    gemm,
    grad_output,
    grad_project,
    grouped_drop,
    grouped_grad_output,
    grouped_grad_project,
    grouped_low_rank_add,
    grouped_project,
    low_rank_add,
    project,
    row_norm,
    scale_cast,
)

# tf32 is fp32 with products in tf32, for which torch.backends asks.
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# The arguments that are fp32 for any activation. A and B are fp32 factors unless they have been
# cast.
WIDE = {
    "A_ptr", "core_ptr", "factor_ptr", "gain_ptr", "bias_ptr", "scale_ptr", "row_scale_ptr",
    "out_scale_ptr", "parts_ptr", "sums_ptr", "u_ptr", "P_ptr", "dB_ptr", "d_out_scale_ptr",
    "absmax_ptr", "code_ptr",
}  # fmt: skip
# The arguments that are no floating-point numbers.
INTEGERS = {"seed_ptr": "i64", "packed_ptr": "u8", "offsets_ptr": "i32", "rows_ptr": "i64"}
# The experts that a form of a grouped kernel holds.
EXPERTS = {"EXPERTS": 128}
# The strides that are 1 for contiguous tensors.
UNIT = {
    "stride_xk", "stride_ak", "stride_vr", "stride_br", "stride_cj", "stride_wk", "stride_dn",
    "stride_kn", "stride_hr", "stride_fj", "stride_oj",
}  # fmt: skip
SIZES = {
    "M", "S", "N", "K", "R", "K0", "K1", "K2", "K3", "rows", "cols", "width", "live", "groups",
    "skipped", "stop", "stop_byte",
}  # fmt: skip


def forms(kernel, dtype, capability):
    """Yield every form of a kernel in a dtype: the function, its tile and its flags."""
    precise = {"PRECISION": "tf32" if dtype == "tf32" else "ieee"}
    both = (False, True)
    if kernel.startswith("gemm"):
        yield from _gemm_forms(kernel, dtype, capability, precise)
        return
    if kernel.endswith("grad_output"):
        yield from _grad_output_forms(kernel, dtype, precise, f"sm_{capability}")
        return
    if kernel.startswith("grouped") or kernel == "add_blocks":
        yield from _grouped_forms(kernel, dtype, precise, f"sm_{capability}")
        return
    for tile in configs.tiles(kernel, DTYPES[dtype], f"sm_{capability}"):
        if kernel == "project":
            for drops, parts in itertools.product(both, both):
                yield project.project_kernel, tile, {"DROPS": drops, "PARTS": parts} | precise
        elif kernel == "project_finish":
            in_registers = configs.core_in_registers(tile.BLOCK_R, DTYPES[dtype])
            for core in (0, 1, 2) if in_registers else (0,):
                yield project.project_finish_kernel, tile, {"CORE": core} | precise
        elif kernel == "grad_project":
            for drops in both:
                yield grad_project.grad_project_kernel, tile, {"DROPS": drops} | precise
        elif kernel == "grad_output_finish":
            yield grad_output.grad_output_finish_kernel, tile, {}
        elif kernel == "low_rank_add":
            for accumulates in both:
                flags = {"ACCUMULATES": accumulates} | precise
                yield low_rank_add.low_rank_add_kernel, tile, flags
        elif kernel == "drop":
            for accumulates in both:
                yield drop.drop_kernel, tile, {"ACCUMULATES": accumulates}
        elif kernel == "dequantise":
            for blocksize in (32, 64, 4096):
                yield dequantise.dequantise_kernel, tile, {"GROUP": blocksize}
        elif kernel == "scale_cast":
            yield scale_cast.scale_cast_kernel, tile, {"TF32": dtype == "tf32"}
        elif kernel == "row_norm":
            for by_row in both:
                precision = {"PRECISION": "tf32"} if "16" in dtype else precise
                rounded = precision["PRECISION"] == "tf32" and configs.BLOCKS_R[0] < tile.BLOCK_R
                flags = {"BY_ROW": by_row, "ROUNDED": rounded} | precision
                yield row_norm.row_norm_kernel, tile, flags


def _grouped_forms(kernel, dtype, precise, arch):
    # Without dropout, with it, and with that of other rows.
    masks = [{"DROPS": drops, "ROWS": rows} for drops, rows in ((0, 0), (1, 0), (1, 1))]
    for tile in configs.tiles(kernel, DTYPES[dtype], arch):
        if kernel == "grouped_project":
            for mask, parts in itertools.product(masks, (False, True)):
                flags = mask | {"PARTS": parts} | EXPERTS | precise
                yield grouped_project.grouped_project_kernel, tile, flags
        elif kernel == "grouped_grad_project":
            for mask in masks:
                flags = mask | EXPERTS | precise
                yield grouped_grad_project.grouped_grad_project_kernel, tile, flags
        elif kernel == "grouped_low_rank_add":
            for mask, inner in [(mask, False) for mask in masks] + [(masks[0], True)]:
                flags = mask | {"INNER": inner} | EXPERTS | precise
                yield grouped_low_rank_add.grouped_low_rank_add_kernel, tile, flags
        elif kernel == "grouped_grad_output_finish":
            yield grouped_grad_output.grouped_grad_output_finish_kernel, tile, {}
        elif kernel == "grouped_drop":
            yield grouped_drop.grouped_drop_kernel, tile, {}
        elif kernel == "grouped_gain":
            yield grouped_drop.grouped_gain_kernel, tile, EXPERTS
        elif kernel == "add_blocks":
            for whole in (False, True):
                yield expert_blocks.add_blocks_kernel, tile, {"WHOLE": whole}


def _grad_output_forms(kernel, dtype, precise, arch):
    grouped, smaller = kernel.startswith("grouped"), 0
    for block in configs.BLOCKS_R:
        one_pass = configs.one_pass(smaller + 1, smaller + 1)
        forms = list(itertools.product((True, False) if one_pass else (False,), (True,), (0, 1, 2)))
        # Without P only the smallest block of ranks is used, and something else is requested.
        if not smaller:
            forms += itertools.product((True, False), (False,), (1, 2))
        smaller = block
        for u, P, sums in forms:
            tile = configs.grad_output_tile(block, DTYPES[dtype], sums, arch)
            lanes = configs.rows_at_once(tile, DTYPES[dtype])
            flags = {"U": u, "P": P, "SUMS": sums, "LANES": lanes} | precise
            if grouped:
                yield grouped_grad_output.grouped_grad_output_kernel, tile, flags | EXPERTS
            else:
                yield grad_output.grad_output_kernel, tile, flags


def _gemm_forms(kernel, dtype, capability, precise):
    if kernel == "gemm_finish":
        yield gemm.gemm_finish_kernel, configs.GEMM_FINISH, {}
        return
    form = kernel.removeprefix("gemm_")
    if form == "tma" and (capability < 90 or "16" not in dtype):
        return
    for masked, many, by_row in itertools.product((False, True), repeat=3):
        flags = {"SEGMENTS": (4 if many else 2) - masked, "MASKED": masked, "BY_ROW": by_row}
        for tile in configs.gemm(form, DTYPES[dtype], masked, many, f"sm_{capability}"):
            if form == "tma":
                yield gemm.gemm_tma_kernel, tile, flags
                continue
            for split in (
                (False, True) if tile.BLOCK_M <= configs.SPLIT_ROWS and not masked else (False,)
            ):
                yield gemm.gemm_kernel, tile, flags | {"SPLIT": split} | precise


def target_of(target):
    """Return Triton's target of a capability, or of an AMD architecture."""
    if isinstance(target, int):
        return GPUTarget("cuda", target, 32)
    return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)


def compiled(function, tile, flags, dtype, target, ones=False):
    """Return a form as a launch on contiguous, aligned tensors with fp32 factors compiles it.

    ones: as for tensors whose sizes and strides are all 1.
    """
    dtype = dtype.replace("tf", "fp")
    constants = flags | {
        name: getattr(tile, name) for name in function.arg_names if name.startswith("BLOCK_")
    }
    if ones:
        constants |= {
            one.name: 1
            for one in function.params
            if _is_size(one.name) and not one.do_not_specialize
        }
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        descriptor = _descriptor_type(function, name, tile, flags, dtype)
        if descriptor is not None:
            signature[name] = descriptor
            constants |= {name: None} if descriptor == "constexpr" else {}
        elif name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            wide = "fp32" if _wide(function, name, flags) else dtype
            signature[name] = f"*{INTEGERS.get(name, wide)}"
        elif name in UNIT:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "fp32" if name in ("scale", "scaling", "one") else "i32"
        even = (
            signature[name] == "i32"
            and _is_size(name)
            and not function.params[place].do_not_specialize
        )
        if name.endswith("_ptr") or even:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=target_of(target), options=options)


def _is_size(name):
    return name in SIZES or name.startswith("stride_")


def _descriptor_type(function, name, tile, flags, dtype):
    """Return the type of an argument that is a descriptor, None for any other argument.

    It describes a block of a, of b, or half a block of the result.
    """
    if function is not gemm.gemm_tma_kernel or name not in {
        "y",
        "z",
        *(f"{side}{i}" for side in "ab" for i in range(4)),
    }:
        return None
    # The slots of segments that the form does not have are None.
    if (
        name[1:]
        and int(name[1:]) >= flags["SEGMENTS"]
        and not (flags["MASKED"] and name[1:] == "3")
    ):
        return "constexpr"
    right = (tile.BLOCK_N, tile.BLOCK_K) if flags["BY_ROW"] else (tile.BLOCK_K, tile.BLOCK_N)
    block = {"a": (tile.BLOCK_M, tile.BLOCK_K), "b": right}.get(
        name[0], (tile.BLOCK_M, tile.BLOCK_N // 2)
    )
    return f"tensordesc<{dtype}[{block[0]},{block[1]}]>"


def _wide(function, name, flags):
    if name == "B_ptr":
        # Those of grad_output and its grouped form have been cast.
        return not function.__name__.endswith("grad_output_kernel")
    if name == "x_ptr":
        # What is added to out is an fp32 product.
        return flags.get("ACCUMULATES", False)
    if name == "out_ptr":
        return function in (
            grad_project.grad_project_kernel, row_norm.row_norm_kernel,
            grouped_grad_project.grouped_grad_project_kernel, expert_blocks.add_blocks_kernel,
        )  # fmt: skip
    return (
        name in WIDE
        or (name == "h_ptr" and flags.get("PARTS"))
        or (name == "y_ptr" and flags.get("SPLIT"))
    )


def usage(built, sass):
    """Return registers, stack and local memory by cuobjdump's report, and instruction counts."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        options = ["--dump-resource-usage", *(["-sass"] if sass else [])]
        dump = subprocess.run(
            [TOOLS / "cuobjdump", *options, file.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = built.asm["ptx"]
    return {
        name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)
    } | {
        "shared": built.metadata.shared,
        "atomics": len(re.findall(r"\b(atom|red)\.\S*f(16|32|64)", ptx)),
        "tensor": len(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", ptx)),
        "wgmma": len(re.findall(r"\bwgmma\.mma_async\b", ptx)),
        # The most products that may still run at a wait for one: at 0 no product overlaps anything.
        "in_flight": max(
            (int(n, 16) for n in re.findall(r"WARPGROUP\.DEPBAR\S*\s.*?(0x\w+)", dump)), default=0
        ),
        # The same in the PTX: ptxas may wait earlier than it is asked to.
        "pending": max(
            (int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", ptx)),
            default=0,
        ),
        "tma_loads": len(re.findall(r"\bcp\.async\.bulk\.tensor\S*shared\S*global\b", ptx)),
        "async_loads": len(re.findall(r"\bcp\.async\.c[ag]\b", ptx)),
    }


def flags_for(target, flags):
    """Return the flags of a form on a target: of AMD's GPUs only gfx942 multiplies in tf32."""
    if isinstance(target, int) or target == "gfx942" or flags.get("PRECISION") != "tf32":
        return flags
    return flags | {"PRECISION": "ieee", "ROUNDED": False}


def amd_usage(built):
    """Return what usage returns, as far as AMD's code has it: registers, spills, memory, counts."""
    code = built.asm["amdgcn"]
    facts = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", code, re.M)}
    return {
        "reg": facts["vgpr_count"],
        "stack": facts["private_segment_fixed_size"],
        "spills": facts["vgpr_spill_count"] + facts["sgpr_spill_count"],
        "shared": built.metadata.shared,
        "atomics": len(re.findall(r"\b(global|buffer|flat)_atomic\w*_f(16|32|64)\b", code)),
        "tensor": len(re.findall(r"\bv_(mfma|wmma)_", code)),
    }


if __name__ == "__main__":
    only_first = sys.argv[1] == "--first"
    dtype, target, *kernels = sys.argv[1 + only_first :]
    target = int(target) if target.isdigit() else target
    # AMD's forms are those of a GPU without TMA.
    capability = target if isinstance(target, int) else 80
    every = {name: list(forms(name, dtype, capability)) for name in kernels}
    for kernel, listed in every.items():
        some = [(function, tile, flags_for(target, flags)) for function, tile, flags in listed]
        if some and not only_first:
            # Triton compiles a size of 1 as a constant, which gives another program.
            compiled(*some[0], dtype, target, ones=True)
        for function, tile, flags in some[:1] if only_first else some:
            built = compiled(function, tile, flags, dtype, target)
            used = (
                usage(built, sass=kernel == "gemm_tma" and capability == 90)
                if isinstance(target, int)
                else amd_usage(built)
            )
            form = {"kernel": kernel, "dtype": dtype, "tile": tile._asdict(), "flags": flags}
            print(json.dumps(form | used), flush=True)
