# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Compile the Triton kernels for a GPU that need not be there: `python -m helpers.compile_kernels 90`.

Prints the name of each kernel that compiled.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tocom_hf.merging import triton_kernels


def compile_kernel(kernel, pointers, constants, num_warps, capability):
    signature = {}
    for name in kernel.arg_names:
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    print(kernel.__name__)


def main():
    capability = int(sys.argv[1])
    indices = {"kept": "*i64", "merged": "*i64", "into": "*i64"}
    for dtype, width, block in (("fp32", 64, 64), ("fp16", 64, 64), ("bf16", 64, 64), ("bf16", 256, 32)):
        pointers = {"keys": f"*{dtype}", "metric": "*fp32", "similarity": "*fp32", "partner": "*i32", **indices}
        # one head is a constant of its own, as Triton treats every argument of one
        constants = {"BLOCK": block, "WIDTH": width, "stride_channel": 1, **({"heads": 1} if dtype == "fp16" else {})}
        compile_kernel(triton_kernels._plan_kernel, pointers, constants, 8, capability)
    for dtype, branch, sized in (
        ("fp32", "bf16", True),
        ("fp16", "fp16", False),
        ("bf16", "bf16", True),
        ("bf16", None, True),
    ):
        pointers = {
            "residual": f"*{dtype}",
            "branch": f"*{branch or dtype}",
            "output": f"*{dtype}",
            "bias": f"*{dtype}",
        }
        pointers |= {"sizes": "*fp32" if sized else f"*{dtype}", "sizes_out": "*fp32", **indices}
        constants = {"HAS_BRANCH": branch is not None, "HAS_SIZES": sized, "BLOCK_R": 16, "BLOCK_HIDDEN": 1024}
        compile_kernel(triton_kernels._merge_kernel, pointers, constants, 4, capability)


if __name__ == "__main__":
    main()
