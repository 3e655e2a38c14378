"""Compiles Triton kernels ahead of time, without a GPU, in its own process: `aot.py KERNEL DTYPE CAPABILITY [heaviest]`.

Prints one JSON line a form: its tile and flags, registers, stack, shared memory, and what its PTX and SASS contain. (pytest's own
process interprets kernels; there they cannot be compiled.)
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

from lorafast.kernels import configs
from lorafast.kernels.grad_project import grad_project_kernel
from lorafast.kernels.project import finish_kernel, project_kernel
from lorafast.kernels.row_norm import row_norm_kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def forms(kernel, dtype):
    """Every form of a kernel in a dtype: the function, its tile, and the flags it is compiled with."""
    precision = "ieee" if dtype == "fp32" else "tf32" if kernel == "row_norm" else "ieee"
    tiles = configs.tiles("project" if kernel == "finish" else kernel, DTYPES[dtype])
    if kernel == "finish":  # which has no BLOCK_K
        tiles = {(tile.BLOCK_M, tile.BLOCK_R): tile for tile in tiles}.values()
    for tile in tiles:
        if kernel == "project":
            cores = (0, 1, 2) if configs.mixes(tile.BLOCK_R, DTYPES[dtype]) else (0,)
            for drops, (core, split) in itertools.product((False, True), [(0, True), *((core, False) for core in cores)]):
                yield project_kernel, tile, {"DROPS": drops, "CORE": core, "SPLIT": split, "PRECISION": precision}
        elif kernel == "finish":
            for core in (0, 1, 2) if configs.mixes(tile.BLOCK_R, DTYPES[dtype]) else (0,):
                yield finish_kernel, tile, {"CORE": core, "PRECISION": precision}
        elif kernel == "grad_project":
            for drops in (False, True):
                yield grad_project_kernel, tile, {"DROPS": drops, "PRECISION": precision}
        else:
            for by_row in (False, True):
                yield row_norm_kernel, tile, {"SCALED": not by_row, "BY_ROW": by_row, "PRECISION": precision}


def heaviest(found):
    """Of every tile the form with the most in it: what compiles without spills there does so with less."""
    return {(function, tile): (function, tile, flags) for function, tile, flags in found}.values()


def compiled(function, tile, flags, dtype, capability):
    """As a launch on contiguous, aligned tensors with fp32 factors would compile it."""
    constants = flags | {name: getattr(tile, name) for name in function.arg_names if name.startswith("BLOCK_")}
    wide = {"A_ptr", "B_ptr", "core_ptr", "scale_ptr", "out_ptr", "sums_ptr"}
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*i64" if name == "seed_ptr" else "*fp32" if name in wide else f"*{dtype}"
            if name == "h_ptr" and flags.get("SPLIT"):
                signature[name] = "*fp32"
        elif name in ("stride_xk", "stride_ak", "stride_vr", "stride_br", "stride_cj", "stride_wk"):
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "fp32" if name in ("scale", "scaling") else "i32"
        if name.endswith("_ptr") or name in ("M", "N", "K") or (name.startswith("stride_") and name not in constants):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(built):
    """Registers, stack and local memory by the assembler's own account, and the instructions that matter."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        told = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True).stdout
    counts = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told.stdout)}
    return counts | {
        "shared": built.metadata.shared,
        "atomics": len(re.findall(r"\b(atom|red)\.\S*f(16|32|64)", built.asm["ptx"])),
        "tensor": len(re.findall(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|OMMA|UTC\w*MMA)\b", sass)),
        "spills": len(re.findall(r"\b(LDL|STL)\b", sass)),
    }


if __name__ == "__main__":
    kernel, dtype, capability = sys.argv[1], sys.argv[2], int(sys.argv[3])
    found = forms(kernel, dtype)
    for function, tile, flags in heaviest(found) if sys.argv[4:] == ["heaviest"] else found:
        built = compiled(function, tile, flags, dtype, capability)
        print(json.dumps({"tile": tile._asdict(), "flags": flags} | usage(built)), flush=True)
